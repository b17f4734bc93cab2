// The head's options as arguments of entries, for both processors.
#pragma once
#include "common/bindings.h"
#include "common/norm.h"
#include "lls/options.h"

LGK_WORDS(lgk::HeadLoss, "cross_entropy", "hard_sigmoid_mse")
LGK_WORDS(lgk::Reduction, "mean", "sum", "none")
LGK_TUPLE(lgk::HeadOptions, 10)
LGK_TUPLE(lgk::ModulationGrad, 9)
LGK_TUPLE(lgk::Norm, 5)
LGK_TUPLE(lgk::BatchStatistics, 7)
