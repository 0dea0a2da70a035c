// Entry points by name. An op's file registers its own; bindings.cpp exposes them all without knowing any.
#pragma once

#include "view.h"

namespace aajr {

using Entry = void (*)(const Args&);

struct Registered {
  const char* name;
  const char* doc;  // order of tensors, integers and floats
  Entry entry;
};

std::vector<Registered>& registry();

struct Register {
  Register(const char* name, const char* doc, Entry entry) { registry().push_back({name, doc, entry}); }
};

}  // namespace aajr
