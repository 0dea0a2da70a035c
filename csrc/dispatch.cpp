#include "dispatch.h"

#include <stdexcept>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace aajr {
namespace {

[[maybe_unused]] bool amx_permitted() {
#if defined(__linux__) && defined(__x86_64__)
  // The tile registers are off until the process asks for them (ARCH_REQ_XCOMP_PERM, XTILEDATA). The permission is
  // per process and inherited by threads.
  static const bool granted = syscall(SYS_arch_prctl, 0x1023, 18) == 0;
  return granted;
#else
  return false;
#endif
}

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_amx() {
  // cpuid leaf 7: EDX bit 22 AMX-BF16, bit 24 AMX-TILE; __builtin_cpu_supports knows neither in older compilers
  unsigned a = 7, b = 0, c = 0, d = 0;
  __asm__("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  return has_avx512() && __builtin_cpu_supports("avx512bf16") && (d >> 22 & 1) && (d >> 24 & 1) && amx_permitted();
}
#else
bool has_avx2() { return false; }
bool has_avx512() { return false; }
bool has_amx() { return false; }
#endif

Capability& selected() {
  static Capability value = initial_capability();
  return value;
}

}  // namespace

const char* capability_name(Capability c) {
  static const char* const names[] = {
#define AAJR_X(name) #name,
      AAJR_CAPABILITIES(AAJR_X)
#undef AAJR_X
  };
  return c == Capability::baseline ? "default" : names[static_cast<int>(c)];
}

bool capability_runs(Capability c) {
  const std::string name = capability_name(c);
  if (name == "default") return true;
  // emulated: the wide code path on 256-bit registers, for testing it where the wide ones are missing
  if (name == "avx2" || name == "avx512_emulated" || name == "amx_emulated") return has_avx2();
  if (name == "avx512") return has_avx512();
  if (name == "amx") return has_amx();
  return false;
}

std::vector<Capability> capabilities() {
  std::vector<Capability> all;
  for (int i = 0; i < static_cast<int>(Capability::count); ++i) all.push_back(static_cast<Capability>(i));
  return all;
}

Capability initial_capability() {
  Capability best = Capability::baseline;
  for (Capability c : capabilities()) {
    const std::string name = capability_name(c);
    if (name.find("emulated") == std::string::npos && capability_runs(c)) best = c;
  }
  return best;
}

Capability current_capability() { return selected(); }

void set_capability(const std::string& name) {
  std::string known;
  for (Capability c : capabilities()) {
    if (capability_name(c) == name) {
      if (!capability_runs(c))
        throw std::invalid_argument("capability '" + name + "' is built in, but this processor cannot run it.");
      selected() = c;
      return;
    }
    known += (known.empty() ? "" : ", ") + std::string(capability_name(c));
  }
  throw std::invalid_argument("capability '" + name + "' is unknown: this build holds " + known + ".");
}

}  // namespace aajr
