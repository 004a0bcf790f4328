// Included before every source: calls the portable kernels, the only ones that are built here.
#pragma once

#include "cpu/isa.h"

#undef DEQCORE_DISPATCH_ISA
#define DEQCORE_DISPATCH_ISA(function, ...) ::deqcore::cpu::portable::function(__VA_ARGS__)
