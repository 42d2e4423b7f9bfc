// What the tests steer the emulator with.
#include <cuda_runtime.h>

extern "C" __attribute__((visibility("default"))) void hpa_emulation_set_order(unsigned order) {
  emulation::set_order(order);
}
