// The plugin for ONNX Runtime: kernels for the operators that `qformat export` leaves in a graph, qformat::Linear_N and
// qformat::Embedding_N (runtime/ort/functions.py), for all codecs.
//
// What a node's attributes and constant inputs say of its weight is read by runtime/ort/plugin.py, which makes a
// qf_weight of it, once for each node when a session is made. Runs never leave this library and ONNX Runtime's threads.
#include "ort.h"

#include <array>
#include <memory>
#include <new>
#include <string>
#include <thread>
#include <vector>

#include "pool.h"
#include "weight.h"

namespace {

using qf::Borrowed;
using qf::Crew;

constexpr int numbers = 256;  // operators of each kind; further ones keep their functions
constexpr int fail = 1, no_memory = 6;  // codes of a status

void* const* api = nullptr;
qf_prepare prepare = nullptr;

template <class F> F call(int place) { return (F)api[place]; }

struct Error {
  ort::Status* status;
};
ort::Status* status_of(const std::string& message, int code = fail) {
  return call<ort::CreateStatus>(0)(code, message.c_str());
}
void check(ort::Status* status) {
  if (status) throw Error{status};
}

template <class F> ort::Status* guarded(const F& body) {
  try {
    body();
    return nullptr;
  } catch (const Error& error) {
    return error.status;
  } catch (const std::bad_alloc&) {
    return status_of("qformat: out of memory", no_memory);
  }
}

// Dimensions of a tensor.
struct Shape {
  std::vector<int64_t> dims;
  int64_t count = 1;

  explicit Shape(const ort::Value* value) {
    ort::TypeAndShape* info;
    check(call<ort::GetTypeAndShape>(65)(value, &info));
    std::unique_ptr<ort::TypeAndShape, ort::ReleaseTypeAndShape> owner(info, call<ort::ReleaseTypeAndShape>(99));
    size_t rank;
    check(call<ort::GetDimensionsCount>(61)(info, &rank));
    dims.resize(rank);
    check(call<ort::GetDimensions>(62)(info, dims.data(), rank));
    for (int64_t n : dims) count *= n;
  }
};

void* data_of(const ort::Value* value) {
  void* out;
  check(call<ort::GetData>(51)(const_cast<ort::Value*>(value), &out));
  return out;
}

std::string attribute(const ort::KernelInfo* info, const char* name) {
  size_t size = 0;
  if (ort::Status* status = call<ort::GetAttribute>(87)(info, name, nullptr, &size))  // tells the size, one way or other
    call<ort::ReleaseStatus>(93)(status);
  std::string out(size, '\0');
  check(call<ort::GetAttribute>(87)(info, name, out.data(), &size));
  out.resize(out.find('\0') == std::string::npos ? size : out.find('\0'));
  return out;
}

// Runs on ONNX Runtime's threads.
Crew crew_of(const ort::KernelContext* context) {
  return [context](const std::function<void()>& work) {
    const auto one = [](void* data, size_t) { (*(const std::function<void()>*)data)(); };
    const size_t cores = std::max(1u, std::thread::hardware_concurrency());
    check(call<ort::ParallelFor>(274)(context, one, cores, 0, (void*)&work));
  };
}

enum Kind { linear, embedding };
constexpr int kinds = 2;
const char* const stems[kinds] = {"Linear_", "Embedding_"};

struct Op : ort::CustomOp {
  Kind kind;
  std::string title;
};

struct Kernel {
  Kind kind;
  const qf_weight* weight;
};

void create(const Op& op, const ort::KernelInfo* info, void** out) {
  const std::string entry = attribute(info, "entry"), name = attribute(info, "weight");
  std::array<char, 1024> message{};
  const qf_weight* weight = prepare(entry.c_str(), name.c_str(), info, message.data(), message.size());
  if (!weight) throw Error{status_of(message.data())};
  *out = new Kernel{op.kind, weight};
}

int32_t take(const qf_weight& w, const int64_t* rows, int64_t n, float* out) {
  std::vector<int64_t> wanted(rows, rows + n);
  for (int64_t& row : wanted) {
    row += row < 0 ? w.rows : 0;  // as Gather counts
    if (row < 0 || row >= w.rows)
      throw Error{status_of("qformat: expected rows below " + std::to_string(w.rows) + ", found " + std::to_string(row))};
  }
  return qf_weight_embedding(&w, wanted.data(), n, out, 0);
}

void compute(const Kernel& k, ort::KernelContext* context) {
  const qf_weight& w = *k.weight;
  const ort::Value* x;
  check(call<ort::GetInput>(90)(context, 0, &x));
  Shape shape(x);
  if (k.kind == embedding) {
    shape.dims.push_back(w.cols);
  } else {
    if (shape.dims.empty() || shape.dims.back() != w.cols)
      throw Error{status_of("qformat: expected " + std::to_string(w.cols) + " columns, found another number")};
    shape.dims.back() = w.rows;
  }
  ort::Value* y;
  check(call<ort::GetOutput>(91)(context, 0, shape.dims.data(), shape.dims.size(), &y));
  if (shape.count == 0) return;
  const Crew crew = crew_of(context);
  const Borrowed here(crew);
  float* out = (float*)data_of(y);
  const void* in = data_of(x);
  const int32_t status = k.kind == embedding ? take(w, (const int64_t*)in, shape.count, out)
                                             : qf_weight_linear(&w, (const float*)in, shape.count / w.cols, out, 0);
  if (status != QF_OK) throw std::bad_alloc();
}

Op made(Kind kind, int number) {
  Op op{};
  op.ort::CustomOp::version = ort::version;
  op.kind = kind;
  op.title = stems[kind] + std::to_string(number);
  op.name = [](const ort::CustomOp* op) { return ((const Op*)op)->title.c_str(); };
  op.provider = [](const ort::CustomOp*) -> const char* { return nullptr; };  // the CPU's
  op.inputs = [](const ort::CustomOp*) { return size_t(2); };  // x, and the parts
  op.input_type = [](const ort::CustomOp* op, size_t i) {
    return int32_t(i ? ort::ANY : ((const Op*)op)->kind == embedding ? ort::INT64 : ort::FLOAT);
  };
  op.input_characteristic = [](const ort::CustomOp*, size_t i) { return i ? 2 : 0; };
  op.variadic_inputs = [](const ort::CustomOp*) { return 1; };
  op.homogeneous_inputs = [](const ort::CustomOp*) { return 0; };
  op.outputs = [](const ort::CustomOp*) { return size_t(1); };
  op.output_type = [](const ort::CustomOp*, size_t) { return int32_t(ort::FLOAT); };
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.memory_type = [](const ort::CustomOp*, size_t) { return 0; };
  op.first_version = op.last_version = [](const ort::CustomOp*) { return 1; };
  op.create_checked = [](const ort::CustomOp* op, void* const*, const ort::KernelInfo* info, void** out) {
    return guarded([&] { create(*(const Op*)op, info, out); });
  };
  op.compute_checked = [](void* kernel, ort::KernelContext* context) {
    return guarded([&] { compute(*(const Kernel*)kernel, context); });
  };
  op.destroy = [](void* kernel) { delete (Kernel*)kernel; };
  return op;
}

ort::Domain* domain() {
  static const std::vector<Op> ops = [] {  // operators and domain live as long as the process: sessions refer to them
    std::vector<Op> all;
    for (int i = 0; i < numbers * kinds; i++) all.push_back(made(Kind(i % kinds), i / kinds));
    return all;
  }();
  static ort::Domain* const made = [] {
    ort::Domain* out;
    check(call<ort::CreateDomain>(26)("qformat", &out));
    for (const Op& op : ops) check(call<ort::DomainAdd>(27)(out, &op));
    return out;
  }();
  return made;
}

}  // namespace

void qf_ort_use(qf_prepare made) { prepare = made; }

int32_t qf_ort_constant(const void* info, int64_t index, const void** data, int64_t* count) {
  ort::Status* status = guarded([&] {
    int32_t constant = 0;
    const ort::Value* value = nullptr;
    check(call<ort::GetConstant>(249)((const ort::KernelInfo*)info, size_t(index), &constant, &value));
    *data = constant && value ? data_of(value) : nullptr;
    *count = *data ? Shape(value).count : 0;
  });
  if (status) call<ort::ReleaseStatus>(93)(status);
  return status ? QF_UNSUPPORTED : QF_OK;
}

QF_EXPORT ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  void* const* found = base->table(ort::version);
  if (!found) {  // older than 1.17: no table of this version, but CreateStatus is the first function of every table
    api = base->table(1);
    return status_of("qformat: expected ONNX Runtime 1.17 or later, found " + std::string(base->version()));
  }
  api = found;
  if (!prepare)
    return status_of("qformat: expected `import qformat.runtime.ort.plugin` before the library is registered");
  return guarded([&] { check(call<ort::AddDomain>(28)(options, domain())); });
}
