// The OrtCustomOp that ONNX Runtime sees, for any of the library's operators.
#pragma once

#include "op.h"

namespace fbiedge {

struct CustomOp : OrtCustomOp {
    Environment environment;
    const OpDefinition* definition;

    CustomOp(const Environment& environment, const OpDefinition& definition, bool infers_shapes);
};

}  // namespace fbiedge
