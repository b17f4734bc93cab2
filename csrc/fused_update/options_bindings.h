// The options of the fused step as arguments of entries, for both processors.
#pragma once
#include "common/bindings.h"
#include "fused_update/options.h"

LGK_WORDS(lgk::Rule, "sgd", "manhattan", "adam")
LGK_TUPLE(lgk::UpdateRule, 12)
LGK_TUPLE(lgk::CodedState, 2)
