// What the tests steer the emulator with.
#include <cuda_runtime.h>

#define HPA_EXPORTED extern "C" __attribute__((visibility("default")))

HPA_EXPORTED void hpa_emulation_set_order(unsigned order) { emulation::set_order(order); }
HPA_EXPORTED void* hpa_emulation_only_stream() { return emulation::only_stream(); }
HPA_EXPORTED void hpa_emulation_capture(int begin) { emulation::capture(begin != 0); }
HPA_EXPORTED int hpa_emulation_replay() { return emulation::replay(); }
