// The kernels that this machine runs.
#pragma once

#include "tensors.h"

namespace tps {

// The best level of this processor, or the one that TPSERVE_ISA names, with the prefetching that suits
// its maker, or that TPSERVE_PREFETCH names (near, far). Null if there is no such thing in the library
// or on this processor; `kernels_problem` then says so.
const Kernels* kernels();
const char* kernels_problem();

}  // namespace tps
