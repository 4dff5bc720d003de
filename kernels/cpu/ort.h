// As much of ONNX Runtime's C interface as a library of custom operators needs. No package of ONNX Runtime for Python
// carries headers; the interface only ever grows at its end, so the numbers below hold for 1.17 and later.
#pragma once
#include <cstddef>
#include <cstdint>

namespace ort {

struct Status;          // null: well
struct SessionOptions;
struct Domain;
struct KernelInfo;
struct KernelContext;
struct Value;
struct TypeAndShape;

constexpr uint32_t version = 17;  // of the interface, as it is asked for and as operators are described

// Element types.
enum : int32_t { ANY = 0, FLOAT = 1, INT64 = 7 };

// Places of functions in the table, and their types.
typedef Status* (*CreateStatus)(int32_t code, const char* message);                                      // 0
typedef Status* (*CreateDomain)(const char* name, Domain** out);                                         // 26
typedef Status* (*DomainAdd)(Domain*, const struct CustomOp*);                                           // 27
typedef Status* (*AddDomain)(SessionOptions*, Domain*);                                                  // 28
typedef Status* (*GetData)(Value*, void** out);                                                          // 51
typedef Status* (*GetDimensionsCount)(const TypeAndShape*, size_t* out);                                 // 61
typedef Status* (*GetDimensions)(const TypeAndShape*, int64_t* out, size_t count);                       // 62
typedef Status* (*GetTypeAndShape)(const Value*, TypeAndShape** out);                                    // 65
typedef Status* (*GetAttribute)(const KernelInfo*, const char* name, char* out, size_t* size);           // 87
typedef Status* (*GetInput)(const KernelContext*, size_t index, const Value** out);                      // 90
typedef Status* (*GetOutput)(KernelContext*, size_t index, const int64_t* dims, size_t n, Value** out);  // 91
typedef void (*ReleaseStatus)(Status*);                                                                  // 93
typedef void (*ReleaseTypeAndShape)(TypeAndShape*);                                                      // 99
typedef Status* (*GetConstant)(const KernelInfo*, size_t index, int32_t* constant, const Value** out);   // 249
typedef Status* (*ParallelFor)(const KernelContext*, void (*call)(void*, size_t), size_t total, size_t batches,
                               void* data);                                                              // 274

struct ApiBase {
  void* const* (*table)(uint32_t version);
  const char* (*version)();
};

// An operator. Members that are null have defaults.
struct CustomOp {
  uint32_t version;
  void* (*create)(const CustomOp*, const void* const* api, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*provider)(const CustomOp*);
  int32_t (*input_type)(const CustomOp*, size_t index);
  size_t (*inputs)(const CustomOp*);
  int32_t (*output_type)(const CustomOp*, size_t index);
  size_t (*outputs)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  int32_t (*input_characteristic)(const CustomOp*, size_t index);   // 0: required, 1: optional, 2: variadic
  int32_t (*output_characteristic)(const CustomOp*, size_t index);
  int32_t (*memory_type)(const CustomOp*, size_t index);
  int32_t (*variadic_inputs)(const CustomOp*);  // at least
  int32_t (*homogeneous_inputs)(const CustomOp*);
  int32_t (*variadic_outputs)(const CustomOp*);
  int32_t (*homogeneous_outputs)(const CustomOp*);
  Status* (*create_checked)(const CustomOp*, void* const* api, const KernelInfo*, void** kernel);
  Status* (*compute_checked)(void* kernel, KernelContext*);
  Status* (*infer_shape)(const CustomOp*, void*);
  int32_t (*first_version)(const CustomOp*);  // of the domain
  int32_t (*last_version)(const CustomOp*);
  size_t (*inplace)(int32_t** in, int32_t** out);
  void (*release_inplace)(int32_t* in, int32_t* out);
  size_t (*aliases)(int32_t** in, int32_t** out);
  void (*release_aliases)(int32_t* in, int32_t* out);
};

}  // namespace ort
