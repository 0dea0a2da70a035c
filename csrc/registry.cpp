#include "registry.h"

namespace aajr {

std::vector<Registered>& registry() {
  static std::vector<Registered> entries;
  return entries;
}

}  // namespace aajr
