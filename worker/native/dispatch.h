// The kernels that this machine runs.
#pragma once

#include "tensors.h"

namespace tps {

// The best level of this processor, or the one that TPSERVE_ISA names. Null if that one is not in the
// library or the processor lacks it; `kernels_problem` then says so.
const Kernels* kernels();
const char* kernels_problem();

}  // namespace tps
