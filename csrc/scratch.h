// Scratch memory that outlives a call. Fresh pages cost more than the kernels that use them (about half a millisecond
// per MB where the system clears 4 KB at a time), so blocks go back to a small pool instead of the system.
#pragma once

#include <cstddef>

namespace aajr {

// A block of at least `bytes`, aligned to cache lines and uninitialised; throws std::bad_alloc. Give it back with the
// same size.
void* take_scratch(size_t bytes);
void give_scratch(void* block, size_t bytes) noexcept;

// Ask the system to back memory that is about to be written for the first time with large pages. A hint: systems without
// them ignore it.
void prefer_large_pages(void* memory, size_t bytes) noexcept;

}  // namespace aajr
