// The words that options have in Python.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
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

template <class Value, std::size_t Count>
Value choose(const char* name, const std::string& given, const Choice<Value> (&choices)[Count]) {
  for (const auto& [word, value] : choices) {
    if (given == word) return value;
  }
  throw pybind11::value_error(std::string(name) + ": got '" + given + "'");
}

inline SelectionOptions selection_options(std::int64_t keep, std::int64_t focus, double alpha0, double alpha1,
                                          const std::string& mode, const std::string& alpha_mode, int alpha_sign,
                                          const std::string& overflow, const std::string& phi_norm) {
  SelectionOptions options;
  options.keep = keep;
  options.focus = focus;
  options.alpha0 = alpha0;
  options.alpha1 = alpha1;
  options.mode = choose("mode", mode, kSelectionModes);
  options.alpha_mode = choose("alpha_mode", alpha_mode, kAlphaModes);
  options.alpha_sign = alpha_sign;
  options.overflow = choose("overflow", overflow, kOverflows);
  options.phi_norm = choose("phi_norm", phi_norm, kPhiNorms);
  return options;
}

}  // namespace hpa::bindings
