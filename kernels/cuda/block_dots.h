// Where a block's dots come from: computed by the block, or (-DLIBRARY_DOTS) left in memory by a library GEMM.
#pragma once
#ifdef LIBRARY_DOTS
#include "library_dots.h"
#else
#include "block_product.h"
#endif
