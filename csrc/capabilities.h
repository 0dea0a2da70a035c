// The instruction sets of this build: the list AAJR_CAPABILITIES(X), and accessors of per-capability kernel tables.
#pragma once

// CMake defines AAJR_X86 where the compiler can target the x86 extensions, AAJR_EMULATED in test builds. Enumerators
// are in ascending order of preference.
#if defined(AAJR_X86)
#define AAJR_CAPABILITIES_X86(X) X(avx2) X(avx512) X(amx)
#else
#define AAJR_CAPABILITIES_X86(X)
#endif
#if defined(AAJR_EMULATED)
#define AAJR_CAPABILITIES_EMULATED(X) X(avx512_emulated) X(amx_emulated)
#else
#define AAJR_CAPABILITIES_EMULATED(X)
#endif
#define AAJR_CAPABILITIES(X) X(baseline) AAJR_CAPABILITIES_X86(X) AAJR_CAPABILITIES_EMULATED(X)

// The AMX capabilities are AVX-512 with other matrix products. Only files listed as such in CMakeLists.txt are
// compiled for them; tables of all other files are those of AVX-512.
#if defined(AAJR_X86) && defined(AAJR_EMULATED)
#define AAJR_DECLARE_KERNELS(Table, accessor)                                              \
  namespace baseline { const Table& accessor(); }                                          \
  namespace avx2 { const Table& accessor(); }                                              \
  namespace avx512 { const Table& accessor(); }                                            \
  namespace avx512_emulated { const Table& accessor(); }
#elif defined(AAJR_X86)
#define AAJR_DECLARE_KERNELS(Table, accessor)     \
  namespace baseline { const Table& accessor(); } \
  namespace avx2 { const Table& accessor(); }     \
  namespace avx512 { const Table& accessor(); }
#else
#define AAJR_DECLARE_KERNELS(Table, accessor) \
  namespace baseline { const Table& accessor(); }
#endif

// The same for files that are also compiled for AMX.
#if defined(AAJR_X86) && defined(AAJR_EMULATED)
#define AAJR_DECLARE_AMX_KERNELS(Table, accessor)   \
  AAJR_DECLARE_KERNELS(Table, accessor)             \
  namespace amx { const Table& accessor(); }        \
  namespace amx_emulated { const Table& accessor(); }
#elif defined(AAJR_X86)
#define AAJR_DECLARE_AMX_KERNELS(Table, accessor) \
  AAJR_DECLARE_KERNELS(Table, accessor)           \
  namespace amx { const Table& accessor(); }
#else
#define AAJR_DECLARE_AMX_KERNELS(Table, accessor) AAJR_DECLARE_KERNELS(Table, accessor)
#endif
