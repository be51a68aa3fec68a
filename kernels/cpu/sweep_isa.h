// The sweeps for one instruction set. sweep.cpp includes this once for each, inside a namespace and under its compiler
// target, with SIMD_WIDTH defined (floats in a vector): written once, in compilers' vector types, without templates.

#include "vector_isa.h"

#include "tile_isa.h"

#include "softmax_isa.h"

#include "sigmoid_isa.h"

#include "distillation_isa.h"

static const Sweeps SWEEPS = {stats_band,          merge_columns,      softmax_grad_band,
                              sigmoid_band,         merge_maxima,       distill_stats_band,
                              merge_cross_columns,  distill_grad_band,  distill_sigmoid_band};
