// Threads of a build without OpenMP. Here and not in the kernel files: what the standard library instantiates for a
// thread has one name in all of them, and the linker would keep that of any capability for everybody.
#pragma once

namespace aajr {

// work(context, slot) on the calling thread, slot 0, and on new ones, one for every slot below `threads`. Returns when
// all are done. Slots whose thread the system refuses are left out, so the work must be complete without them.
void on_threads(int threads, void (*work)(void* context, int slot), void* context);

}  // namespace aajr
