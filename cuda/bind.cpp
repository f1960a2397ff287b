// The Python module engine._native: what it exports is listed at the end of this file, and of
// bind_fused.cpp.
//
// It knows no tensors, only addresses and sizes, so it fits every release of torch. The one caller
// is engine/ops/native.py, which checks tensors; what can be checked from numbers is checked here
// again, so that no mistake in Python reaches a kernel.
#include "bind.h"

#include <pybind11/stl.h>

#include <algorithm>
#include <initializer_list>
#include <memory>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace py = pybind11;

namespace avl {
namespace {

int64_t number(const py::dict& fields, const char* name) {
  if (!fields.contains(name)) throw py::key_error(name);
  return fields[name].cast<int64_t>();
}

template <class T>
T* address(const py::dict& fields, const char* name) {
  return reinterpret_cast<T*>(static_cast<uintptr_t>(number(fields, name)));
}

int32_t size(const py::dict& fields, const char* name, int64_t least, int64_t most) {
  const int64_t value = number(fields, name);
  require(value >= least && value <= most, std::string(name) + " must be within " +
                                               std::to_string(least) + ".." + std::to_string(most) +
                                               ", got " + std::to_string(value));
  return static_cast<int32_t>(value);
}

const CpuKernels& kernels(const std::string& isa) {
  const CpuKernels* table = cpu_kernels(isa.empty() ? nullptr : isa.c_str());
  require(table != nullptr, "this processor has no " + isa);
  return *table;
}

// Waking a second thread costs about as much as reading this many bytes.
constexpr int64_t ONE_THREAD_BYTES = 1 << 18;

// One attention call, checked once and run many times. Python keeps the tensors alive.
class AttentionPlan {
 public:
  AttentionPlan(const std::string& op, bool cuda, const std::string& isa, const py::dict& f)
      : op_(op), cuda_(cuda), table_(kernels(isa)) {
    read_sizes(f);
    for (const py::handle tier : f["tiers"]) read_tier(tier.cast<py::dict>());
    require(a_.tier_count == 1 || (a_.tier_count > 1 && op == "attention"),
            op + " cannot take " + std::to_string(a_.tier_count) + " tiers");
    read_addresses(f);
    if (cuda_) {
      check_alignment();
      check_stages();
    } else {
      a_.error = &error_;
      const int64_t numbers = int64_t(a_.rows) * a_.width * a_.kv_heads * a_.head_dim;
      if (2 * bytes_of(a_.dtype, numbers) < ONE_THREAD_BYTES) a_.threads = 1;  // K and V
      a_.splits = op == "attention" ? cpu_splits(a_) : 1;
      partials_.resize(size_t(a_.rows) * a_.heads * a_.splits * (a_.head_dim + 2));
      a_.partials = partials_.data();
    }
  }

  void run(uintptr_t stream) {
    raise_for(call_and_record(op_,
                              [this, stream] {
                                return cuda_ ? run_cuda(reinterpret_cast<void*>(stream))
                                             : run_cpu();
                              }),
              op_);
  }

 private:
  void read_sizes(const py::dict& f) {
    constexpr int64_t most = INT32_MAX;
    a_.dtype = plain_dtype_of(number(f, "dtype"));
    a_.rows = size(f, "rows", 0, most);
    a_.heads = size(f, "heads", 1, 1 << 16);
    a_.kv_heads = size(f, "kv_heads", 1, a_.heads);
    require(a_.heads % a_.kv_heads == 0, "heads must be a multiple of kv_heads");
    require(a_.heads / a_.kv_heads <= 64, "at most 64 heads may share a kv head");
    a_.head_dim = size(f, "head_dim", 1, 1024);
    a_.threads = size(f, "threads", 1, 1024);
    a_.splits = size(f, "splits", 1, 65535);
    a_.device = size(f, "device", 0, 1024);
    a_.scale = f["scale"].cast<float>();
    read_strides(f, {{"q_row", &a_.q_row}, {"q_head", &a_.q_head}});
  }

  // The next tier; its logits follow those of the tiers before it.
  void read_tier(const py::dict& f) {
    require(a_.tier_count < MAX_TIERS, "too many tiers");
    Tier& t = a_.tiers[a_.tier_count++];
    t.width = size(f, "width", 0, 1 << 28);
    t.at = a_.width;
    a_.width += t.width;
    t.pool_slots = size(f, "pool_slots", 0, INT32_MAX);
    t.k_slot = size(f, "k_slot", 0, INT32_MAX);
    t.v_slot = size(f, "v_slot", 0, INT32_MAX);
    read_strides(f, {{"k_head", &t.k_head},
                     {"v_head", &t.v_head},
                     {"slots_row", &t.slots_row},
                     {"slots_list", &t.slots_list},
                     {"count_row", &t.count_row},
                     {"count_list", &t.count_list}});
    t.k = address<void>(f, "k");
    t.v = address<void>(f, "v");
    t.slots = address<int32_t>(f, "slots");
    t.count = address<int32_t>(f, "count");
    read_pages(f, t);
    const bool empty = a_.rows == 0 || t.width == 0;
    require(empty || op_ == "pv" || t.k, "k must not be null");
    require(empty || op_ == "qk" || t.v, "v must not be null");
  }

  // What a tier of pages has besides.
  void read_pages(const py::dict& f, Tier& t) {
    t.paged = size(f, "paged", 0, 1);
    require(!t.paged || op_ == "attention", op_ + " takes no pages");
    for (auto [name, side] : {std::pair{"key", &t.key}, std::pair{"value", &t.value}}) {
      const auto numbers = f[name].cast<std::tuple<int64_t, int64_t, int64_t, int64_t>>();
      side->format = dtype_of(std::get<0>(numbers));
      side->block = static_cast<int32_t>(std::get<1>(numbers));
      side->codes = static_cast<int32_t>(std::get<2>(numbers));
      side->scales = static_cast<int32_t>(std::get<3>(numbers));
      require(!t.paged || side->format >= DType::q8 || side->format == a_.dtype,
              "plain numbers of pages must be of q's dtype");
      require(side->block >= a_.kv_heads * (side->codes + side->scales), "a block is too short");
    }
    t.page = number(f, "page");
    require(t.page >= 0, "page must not be negative");
    t.sifting = {address<float>(f, "most"), address<float>(f, "mean"), address<float>(f, "spent"),
                 number(f, "mean_row"), number(f, "spent_row")};
    require(!t.sifting.most || op_ == "attention", op_ + " does not sift");
  }

  // Where a tier is sifted, memory for its logits and choices. A thread has it once, not every
  // plan: what one call leaves there no other reads.
  void lend_sieve() {
    bool sifts = false;
    for (const Tier& t : a_.tiers) sifts |= t.sifting.most != nullptr;
    if (!sifts) return;
    thread_local std::vector<float> sieve, rest;
    thread_local std::vector<int32_t> chosen;
    auto at_least = [](auto& buffer, size_t size) {
      if (buffer.size() < size) buffer.resize(size);
      return buffer.data();
    };
    a_.sieve = at_least(sieve, size_t(a_.rows) * a_.heads * a_.width);
    a_.chosen = at_least(chosen, size_t(a_.rows) * a_.kv_heads * a_.width);
    a_.rest = at_least(rest, size_t(a_.rows) * a_.heads * (MAX_TIERS + 1) * 2);
  }

  static void read_strides(const py::dict& f,
                           std::initializer_list<std::pair<const char*, int64_t*>> strides) {
    for (auto [name, to] : strides) {
      *to = number(f, name);
      require(*to >= 0, std::string(name) + " is a stride and must not be negative");
    }
  }

  void read_addresses(const py::dict& f) {
    a_.q = address<void>(f, "q");
    a_.out = address<void>(f, "out");
    a_.logits = address<float>(f, "logits");
    a_.lse = address<float>(f, "lse");
    a_.p = address<float>(f, "p");
    a_.error = address<int32_t>(f, "error");
    a_.partials = address<float>(f, "partials");
    a_.tickets = address<int32_t>(f, "tickets");
    a_.sieve = address<float>(f, "sieve");
    a_.chosen = address<int32_t>(f, "chosen");
    a_.rest = address<float>(f, "rest");
    const bool empty = a_.rows == 0 || a_.width == 0;
    require(empty || op_ == "pv" || a_.q, "q must not be null");
    require(empty || op_ == "qk" || a_.out, "out must not be null");
    require(empty || op_ != "qk" || a_.logits, "logits must not be null");
    require(empty || op_ != "pv" || a_.p, "p must not be null");
    require(op_ == "pv" || op_ == "qk" || op_ == "attention", "no such operator: " + op_);
  }

  // What the CUDA kernels need over pages, and where a tier is sifted.
  void check_stages() const {
    const bool empty = a_.rows == 0 || a_.width == 0;
    for (const Tier& t : a_.tiers) {
      require(empty || !(t.paged || t.sifting.most) || a_.sieve || a_.logits,
              "sieve must not be null");
      require(!t.sifting.most || (a_.chosen && a_.rest), "chosen and rest must not be null");
      const int64_t longest = std::max(t.k_slot, t.v_slot);
      require(std::max(t.page, PAGE * bytes_of(a_.dtype, longest)) <= INT32_MAX || !in_stages(a_),
              "tokens are too far apart");
    }
  }

  // The CUDA kernels load 16 bytes at a time.
  void check_alignment() const {
    uintptr_t all = reinterpret_cast<uintptr_t>(a_.q) | reinterpret_cast<uintptr_t>(a_.out);
    for (int64_t stride : {a_.q_row, a_.q_head}) all |= bytes_of(a_.dtype, stride);
    for (const Tier& t : a_.tiers) {  // those that are not used are zero
      all |= reinterpret_cast<uintptr_t>(t.k) | reinterpret_cast<uintptr_t>(t.v);
      for (int64_t stride : {int64_t(t.k_slot), t.k_head, int64_t(t.v_slot), t.v_head})
        all |= bytes_of(a_.dtype, stride);
      all |= t.page | t.key.block | t.value.block;
      all |= reinterpret_cast<uintptr_t>(t.sifting.mean) | bytes_of(DType::f32, t.sifting.mean_row);
    }
    require(all % 16 == 0, "q, k, v and means must lie on 16-byte boundaries");
  }

  int run_cpu() {
    error_ = 0;
    lend_sieve();
    const int status = op_ == "attention" ? table_.attention(a_)
                       : op_ == "qk"      ? table_.qk(a_)
                                          : table_.pv(a_);
    if (!error_) return status;
    return a_.tier_count == 1 ? bad_slot : bad_slot + error_;
  }

  int run_cuda(void* stream) {
#if AVL_WITH_CUDA
    return op_ == "attention" ? cuda_attention(a_, stream)
           : op_ == "qk"      ? cuda_qk(a_, stream)
                              : cuda_pv(a_, stream);
#else
    (void)stream;
    return cuda_error;
#endif
  }

  AttentionArgs a_{};
  std::string op_;
  bool cuda_;
  const CpuKernels& table_;
  int32_t error_ = 0;
  std::vector<float> partials_;
};

// Scratch begins at a line of the cache: a vector that straddles two takes twice as long to load.
struct alignas(64) Line {
  float numbers[16];
};

void gemv(const CpuKernels* table, GemvArgs a, const std::vector<GemvPart>& parts) {
  require(a.rows <= 32, "gemv: wrong rows");
  int64_t outs = 0;
  for (const GemvPart& part : parts) outs += part.out;
  if (bytes_of(a.dtype, a.in * outs) < ONE_THREAD_BYTES) a.threads = 1;
  call_and_record("gemv", [a, parts, table] {
    thread_local std::vector<Line> scratch;
    scratch.resize((gemv_scratch(a.rows, a.in) + 15) / 16);
    GemvArgs now = a;
    now.part_count = static_cast<int32_t>(parts.size()), now.parts = parts.data();
    now.scratch = scratch[0].numbers;
    return table->gemv(now);
  });
}

void gemm(const CpuKernels* table, GemvArgs a, const std::vector<GemvPart>& parts) {
  call_and_record("gemm", [a, parts, table] {
    const size_t lines = a.threads * table->gemm_scratch / sizeof(Line);
    const std::unique_ptr<Line[]> scratch(new Line[lines]);
    GemvArgs now = a;
    now.part_count = static_cast<int32_t>(parts.size()), now.parts = parts.data();
    now.scratch = scratch[0].numbers;
    return table->gemm(now);
  });
}

RankArgs rank_args(const py::dict& f) {
  RankArgs a{};
  a.logits = address<float>(f, "logits");
  a.lse = address<float>(f, "lse");
  a.slots = address<int32_t>(f, "slots");
  a.out = address<int32_t>(f, "out");
  a.first = address<int32_t>(f, "first");
  a.last = address<int32_t>(f, "last");
  a.keep = address<int32_t>(f, "keep");
  a.at = address<int32_t>(f, "at");
  a.wanted = address<int32_t>(f, "wanted");
  require(a.first && a.last && a.keep && a.at && a.wanted && a.lse, "rank: an address is null");
  return a;
}

AgeArgs age_args(const py::dict& f) {
  AgeArgs a{};
  a.kv_heads = size(f, "kv_heads", 1, 1 << 16);
  a.places = size(f, "places", 1, INT32_MAX);
  a.logits = address<float>(f, "logits");
  a.lse = address<float>(f, "lse");
  a.first = address<int32_t>(f, "first");
  a.start = address<int64_t>(f, "start");
  a.used = address<int32_t>(f, "used");
  a.budget = address<int32_t>(f, "budget");
  a.recent = address<int32_t>(f, "recent");
  a.position = address<int32_t>(f, "position");
  a.scores = address<float>(f, "scores");
  a.positions = address<int32_t>(f, "positions");
  a.write = address<int64_t>(f, "write");
  require(a.first && a.start && a.used && a.budget && a.recent && a.position, "age: null address");
  require(a.lse && a.scores && a.positions && a.write, "age: an address is null");
  return a;
}

#if AVL_WITH_CUDA
constexpr PolicyKernels cuda_policy{cuda_rank, cuda_age};
#else
constexpr PolicyKernels cuda_policy{};
#endif

// One call of the policy launch, checked once and run many times. Python keeps the tensors alive.
class PolicyPlan {
 public:
  PolicyPlan(const std::string& op, bool cuda, const std::string& isa, const py::dict& f)
      : op_(op) {
    require(op == "rank" || op == "age", "no such operator: " + op);
    require(!cuda || cuda_policy.rank, op + ": built without CUDA");
    require(!cuda || number(f, "error"), op + ": error must not be null");
    const PolicyKernels& table = cuda ? cuda_policy : kernels(isa).policy;
    if (op == "rank")
      call_ = bound(rank_args(f), f, table.rank);
    else
      call_ = bound(age_args(f), f, table.age);
  }

  // Never on a tape: which steps select what is decided in Python.
  void run(uintptr_t stream) {
    int status;
    {
      py::gil_scoped_release unlocked;
      status = call_(reinterpret_cast<void*>(stream));
    }
    raise_for(status, op_);
  }

 private:
  // The kernel with its arguments, those filled in that both operators have.
  template <class Args>
  static std::function<int(void*)> bound(Args a, const py::dict& f,
                                         int (*kernel)(const Args&, void*)) {
    a.problems = size(f, "problems", 1, 65535);
    a.rows = size(f, "rows", 1, a.problems);
    a.heads = size(f, "heads", 1, 1 << 16);
    a.width = size(f, "width", 0, 1 << 28);
    require(a.problems % a.rows == 0, "problems must be a multiple of rows");
    if constexpr (std::is_same_v<Args, AgeArgs>)
      require(a.heads % a.kv_heads == 0, "heads must be a multiple of kv_heads");
    a.error = address<int32_t>(f, "error");
    a.threads = size(f, "threads", 1, 1024);
    a.device = size(f, "device", 0, 1024);
    return [a, kernel](void* stream) { return kernel(a, stream); };
  }

  std::string op_;
  std::function<int(void*)> call_;
};

double read(uintptr_t data, int64_t count, int32_t threads) {
  py::gil_scoped_release unlocked;
  return kernels("").read(reinterpret_cast<const float*>(data), count, threads);
}

}  // namespace
}  // namespace avl

PYBIND11_MODULE(_native, m) {
  m.doc() = "Kernels of the engine on raw addresses; call them through engine.native.";
  m.attr("with_cuda") = bool(AVL_WITH_CUDA);
  py::list formats;  // name, run and bytes of each; its place is the number that stands for it
  for (const avl::Format& f : avl::FORMATS) formats.append(py::make_tuple(f.name, f.run, f.bytes));
  m.attr("formats") = formats;
  m.def("cpu_isa", [] { return std::string(avl::cpu_kernels()->name); });
  m.def("has_isa", [](const std::string& isa) { return avl::cpu_kernels(isa.c_str()) != nullptr; });
  py::class_<avl::AttentionPlan>(m, "AttentionPlan")
      .def(py::init<const std::string&, bool, const std::string&, const py::dict&>(), py::arg("op"),
           py::arg("cuda"), py::arg("isa"), py::arg("fields"))
      .def("run", &avl::AttentionPlan::run, py::arg("stream"));
  py::class_<avl::PolicyPlan>(m, "PolicyPlan")
      .def(py::init<const std::string&, bool, const std::string&, const py::dict&>(), py::arg("op"),
           py::arg("cuda"), py::arg("isa"), py::arg("fields"))
      .def("run", &avl::PolicyPlan::run, py::arg("stream"));
  for (auto [name, product] : {std::pair("gemv", avl::gemv), std::pair("gemm", avl::gemm)})
    m.def(name, [product = product](int dtype, int x_dtype, int64_t rows, int64_t in, uintptr_t x,
                                    int64_t x_row, const std::vector<avl::Part>& parts, int threads,
                                    const std::string& isa) {
      static const avl::CpuKernels* best = avl::cpu_kernels();
      const avl::GemvArgs args = avl::product_args(dtype, x_dtype, rows, in, x, x_row, threads);
      product(isa.empty() ? best : &avl::kernels(isa), args, avl::product_parts(args.dtype, parts));
    });
  py::class_<avl::Tape>(m, "Tape")
      .def(py::init<>())
      .def("start", [](avl::Tape& tape) { avl::recording = &tape; })
      .def("stop", [](avl::Tape&) { avl::recording = nullptr; })
      .def("run", &avl::Tape::run)
      .def("__len__", &avl::Tape::size);
  avl::bind_fused(m);
  avl::bind_gemv(m);
  m.def("cpu_fused", [](const std::string& isa) { return avl::kernels(isa).fused; });
  m.def("read", &avl::read, py::arg("data"), py::arg("count"), py::arg("threads"));
}
