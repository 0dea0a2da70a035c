// Which instruction set the kernels use. Every kernel file is compiled once per capability, into a namespace of its
// own, and offers a table of functions; AAJR_SELECT picks the table of the current capability.
#pragma once

#include <string>
#include <vector>

#include "capabilities.h"

namespace aajr {

enum class Capability : int {
#define AAJR_X(name) name,
  AAJR_CAPABILITIES(AAJR_X)
#undef AAJR_X
      count
};

// Name as users write it: "default", "avx2", "avx512", "amx", and "..._emulated" in test builds.
const char* capability_name(Capability c);
// Whether this processor and operating system can run it.
bool capability_runs(Capability c);
std::vector<Capability> capabilities();
Capability current_capability();
// Throws std::invalid_argument for a name that is unknown, not built, or cannot run here.
void set_capability(const std::string& name);
// Best capability that runs here, never an emulated one.
Capability initial_capability();

}  // namespace aajr


// The kernel table `accessor()` of the current capability, as a reference; AAJR_SELECT_AMX for tables that have an AMX
// version of their own.
#if defined(AAJR_X86)
#define AAJR_SELECT_X86(accessor) \
  case ::aajr::Capability::avx2: return ::aajr::avx2::accessor();
#define AAJR_SELECT_AVX512(accessor)                                \
  case ::aajr::Capability::avx512:                                  \
  case ::aajr::Capability::amx: return ::aajr::avx512::accessor();
#define AAJR_SELECT_BOTH(accessor)                                  \
  case ::aajr::Capability::avx512: return ::aajr::avx512::accessor(); \
  case ::aajr::Capability::amx: return ::aajr::amx::accessor();
#else
#define AAJR_SELECT_X86(accessor)
#define AAJR_SELECT_AVX512(accessor)
#define AAJR_SELECT_BOTH(accessor)
#endif
#if defined(AAJR_X86) && defined(AAJR_EMULATED)
#define AAJR_SELECT_EMULATED(accessor)              \
  case ::aajr::Capability::avx512_emulated:         \
  case ::aajr::Capability::amx_emulated: return ::aajr::avx512_emulated::accessor();
#define AAJR_SELECT_EMULATED_BOTH(accessor)                                             \
  case ::aajr::Capability::avx512_emulated: return ::aajr::avx512_emulated::accessor(); \
  case ::aajr::Capability::amx_emulated: return ::aajr::amx_emulated::accessor();
#else
#define AAJR_SELECT_EMULATED(accessor)
#define AAJR_SELECT_EMULATED_BOTH(accessor)
#endif

#define AAJR_SELECT_CASES(accessor, wide, emulated)               \
  ([]() -> decltype(::aajr::baseline::accessor()) {               \
    switch (::aajr::current_capability()) {                       \
      AAJR_SELECT_X86(accessor)                                   \
      wide(accessor)                                              \
      emulated(accessor)                                          \
      default: return ::aajr::baseline::accessor();               \
    }                                                             \
  }())
#define AAJR_SELECT(accessor) AAJR_SELECT_CASES(accessor, AAJR_SELECT_AVX512, AAJR_SELECT_EMULATED)
#define AAJR_SELECT_AMX(accessor) AAJR_SELECT_CASES(accessor, AAJR_SELECT_BOTH, AAJR_SELECT_EMULATED_BOTH)
