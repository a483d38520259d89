// Our declaration of ONNX Runtime's C ABI, in a namespace of its own: an app that links the library statically has the
// official one, and one program must not hold two of the same name.
#pragma once

#include <stddef.h>
#include <stdint.h>

#define FBIEDGE_ORT_WITHOUT_ENTRY
namespace fbiedge_ort_abi {
#include "abi/onnxruntime_c_api.h"
}
