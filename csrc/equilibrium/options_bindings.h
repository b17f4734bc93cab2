// What describes settling as arguments of entries, for both processors.
#pragma once
#include "common/bindings.h"
#include "equilibrium/options.h"

LGK_WORDS(lgk::StateActivation, "sigmoid", "dsilu", "hard_sigmoid", "clipped_relu")
LGK_WORDS(lgk::StateLoss, "cross_entropy", "mse")
LGK_WORDS(lgk::StateSchedule, "synchronous", "asynchronous")
LGK_WORDS(lgk::StateWanted, "states", "tangent", "error")
LGK_TUPLE(lgk::Settling, 5)
LGK_TUPLE(lgk::StateLayer, 4)
LGK_TUPLE(lgk::StateEdge, 3)
LGK_TUPLE(lgk::StateReadout, 4)
