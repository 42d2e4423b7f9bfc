// The words that options have in Python.
#pragma once

#include <utility>

#include "hpa/kernels.h"

namespace hpa::bindings {

template <class Value>
using Choice = std::pair<const char*, Value>;

inline constexpr Choice<DiagonalMode> kDiagonalModes[] = {{"exact", DiagonalMode::exact},
                                                          {"pivot", DiagonalMode::pivot}};
inline constexpr Choice<SelectionOptions::Mode> kSelectionModes[] = {
    {"full", SelectionOptions::Mode::full}, {"eps", SelectionOptions::Mode::eps}, {"phi", SelectionOptions::Mode::phi}};
inline constexpr Choice<SelectionOptions::AlphaMode> kAlphaModes[] = {{"affine", SelectionOptions::AlphaMode::affine},
                                                                      {"relu", SelectionOptions::AlphaMode::relu},
                                                                      {"abs", SelectionOptions::AlphaMode::abs},
                                                                      {"const", SelectionOptions::AlphaMode::constant}};
inline constexpr Choice<SelectionOptions::Overflow> kOverflows[] = {{"cap", SelectionOptions::Overflow::cap},
                                                                    {"keep", SelectionOptions::Overflow::keep}};
inline constexpr Choice<SelectionOptions::PhiNorm> kPhiNorms[] = {{"none", SelectionOptions::PhiNorm::none},
                                                                  {"mean", SelectionOptions::PhiNorm::mean}};

}  // namespace hpa::bindings
