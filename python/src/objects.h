// The library's values as tvm-ffi objects: reference counted, passed to and from Python as handles.
#pragma once

#include <utility>

#include "convert.h"

namespace octomoe::python {

// One object type per C++ type: `XRef` is what the exported functions take and return.
#define OCTOMOE_DECLARE_OBJECT(Name, Value)                                                  \
  class Name##Object : public ffi::Object {                                                  \
   public:                                                                                   \
    explicit Name##Object(Value v) : value(std::move(v)) {}                                  \
    mutable Value value;                                                                     \
    static constexpr bool _type_mutable = true;                                              \
    TVM_FFI_DECLARE_OBJECT_INFO_FINAL("octomoe." #Name, Name##Object, ffi::Object);          \
  };                                                                                         \
  class Name##Ref : public ffi::ObjectRef {                                                  \
   public:                                                                                   \
    explicit Name##Ref(Value v) : ObjectRef(ffi::make_object<Name##Object>(std::move(v))) {} \
    Value& operator*() const { return get()->value; }                                        \
    TVM_FFI_DEFINE_OBJECT_REF_METHODS_NOTNULLABLE(Name##Ref, ffi::ObjectRef, Name##Object);  \
  }

// A prepared matrix forgets its shape; callers need it to allocate outputs.
struct Prepared {
  PreparedMatrix matrix;
  OptionMap info;
};

// Routing options without the bias, which is an argument of each call.
using Router = RouteOptions;

OCTOMOE_DECLARE_OBJECT(MoeWeights, MoeWeights);
OCTOMOE_DECLARE_OBJECT(MoeLayer, MoeLayer);
OCTOMOE_DECLARE_OBJECT(QuantizedMatrix, QuantizedMatrix);
OCTOMOE_DECLARE_OBJECT(PreparedMatrix, Prepared);
OCTOMOE_DECLARE_OBJECT(Router, Router);
OCTOMOE_DECLARE_OBJECT(Checkpoint, Checkpoint);

}  // namespace octomoe::python
