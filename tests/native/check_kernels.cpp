// Runs the attention kernels - CUDA's in the block emulator, the CPU's as they are - against a
// reference in double. Meant to be built with AddressSanitizer: every buffer has exactly the size
// it needs, inputs that must not be read are NaN, outputs start as NaN.
//
//   check_kernels [emulated|cpu]     prints one line for each mistake; exit code 1 if there was one
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "../../cuda/cpu/kernels.h"
#include "../../cuda/numeric.h"
#ifdef AVL_CPU_ONLY  // quicker to compile
#include "../../cuda/launch.h"
namespace emulator {
int order = 0;
}
int avl::cuda_attention(const AttentionArgs&, void*) {
  return unsupported;
}
int avl::cuda_qk(const AttentionArgs&, void*) {
  return unsupported;
}
int avl::cuda_pv(const AttentionArgs&, void*) {
  return unsupported;
}
#else
#define AVL_EMULATED
#include "../../cuda/launch.cu"
#include "../../cuda/sift.cu"
#endif
#define AVL_ISA plain
#include "../../cuda/cpu/policy.h"

namespace {

using namespace avl;

struct Case {
  DType dtype;
  int rows, kv_heads, group, head_dim, n;
  bool per_head;
  int splits, tiers;
  const char* isa;  // null: emulated
};

int mistakes = 0;
const char* const ISAS[] = {"baseline", "avx2", "avx512", "neon", "neon_bf16"};

void mistake(const Case& c, const char* op, const char* what, double got, double limit) {
  std::printf(
      "%s %s: %s: %g, limit %g (dtype %d, rows %d, kv heads %d x %d, size %d, n %d, per head"
      " %d, splits %d, tiers %d, order %d)\n",
      c.isa ? c.isa : "emulated", op, what, got, limit, int(c.dtype), c.rows, c.kv_heads, c.group,
      c.head_dim, c.n, c.per_head, c.splits, c.tiers, emulator::order);
  if (++mistakes == 20) std::exit(1);  // enough to see that something is wrong
}

// Numbers of any dtype in a buffer of exactly their size, on a 16-byte boundary.
struct Numbers {
  DType dtype;
  size_t size;
  std::unique_ptr<char[]> bytes;

  Numbers(DType dtype, size_t size) : dtype(dtype), size(size), bytes(new char[size * width()]) {}
  size_t width() const { return dtype == DType::f32 ? 4 : 2; }
  void set(size_t i, float x) {
    char* at = bytes.get() + i * width();
    if (dtype == DType::f32) std::memcpy(at, &x, 4);
    const uint16_t half = dtype == DType::f16 ? from_float<fp16>(x).bits : from_float<bf16>(x).bits;
    if (dtype != DType::f32) std::memcpy(at, &half, 2);
  }
  float get(size_t i) const {
    const char* at = bytes.get() + i * width();
    float x;
    uint16_t half;
    if (dtype == DType::f32) return std::memcpy(&x, at, 4), x;
    std::memcpy(&half, at, 2);
    return dtype == DType::f16 ? to_float(fp16{half}) : to_float(bf16{half});
  }
  void fill(float x) {
    for (size_t i = 0; i < size; ++i) set(i, x);
  }
};

template <class T>
std::unique_ptr<T[]> filled(size_t size, T value) {
  std::unique_ptr<T[]> made(new T[size]);
  for (size_t i = 0; i < size; ++i) made[i] = value;
  return made;
}

struct Pool {
  Numbers k, v;
};

// One call's inputs and outputs, and the reference. Every list is cut into `tiers` pieces, each
// over a pool of its own: what should come out is as if it were whole.
struct Problem {
  Case c;
  int heads, width, piece, pool, lists;
  Numbers q, out;
  std::vector<Pool> pools;
  std::unique_ptr<int32_t[]> slots, count, tickets;
  std::vector<std::unique_ptr<int32_t[]>> counts;  // of each piece
  std::unique_ptr<float[]> logits, lse, partials, p, product;
  int32_t error = 0;
  AttentionArgs a{};

  explicit Problem(const Case& c)
      : c(c),
        heads(c.kv_heads * c.group),
        width(c.n + 3),
        piece((width + c.tiers - 1) / c.tiers),
        pool(c.n + c.n / 3 + 2),
        lists(c.per_head ? c.kv_heads : 1),
        q(c.dtype, size_t(c.rows) * heads * c.head_dim),
        out(c.dtype, q.size) {
    const size_t numbers = size_t(pool) * c.kv_heads * c.head_dim;
    for (int t = 0; t < c.tiers; ++t)
      pools.push_back({Numbers(c.dtype, numbers), Numbers(c.dtype, numbers)});
    fill();
    point();
  }

  int entries(int row, int kv_head) const {
    return count[row * lists + (c.per_head ? kv_head : 0)];
  }
  int slot(int row, int kv_head, int i) const {
    return slots[(row * lists + (c.per_head ? kv_head : 0)) * width + i];
  }

  // Where in its pool the key and the value of an entry begin.
  size_t place(int row, int kv_head, int i) const {
    return (size_t(slot(row, kv_head, i)) * c.kv_heads + kv_head) * c.head_dim;
  }

  void fill() {
    std::mt19937 random(c.n * 31 + c.head_dim);
    std::normal_distribution<float> normal;
    for (Pool& each : pools) each.k.fill(NAN), each.v.fill(NAN);
    out.fill(NAN);
    for (size_t i = 0; i < q.size; ++i) q.set(i, 2 * normal(random));
    slots = filled<int32_t>(size_t(c.rows) * lists * width, 1 << 30);
    count = filled<int32_t>(c.rows * lists, c.n);
    for (int l = 0; l < lists; ++l) count[(c.rows - 1) * lists + l] = c.n - (c.n + l) / 2;
    for (int row = 0; row < c.rows; ++row)
      for (int l = 0; l < lists; ++l)
        for (int i = 0; i < count[row * lists + l]; ++i)
          slots[(row * lists + l) * width + i] = (i * 7 + row + l) % pool;
    for (int row = 0; row < c.rows; ++row)
      for (int h = 0; h < c.kv_heads; ++h)
        for (int i = 0; i < entries(row, h); ++i)
          for (int d = 0; d < c.head_dim; ++d) {
            Pool& of = pools[i / piece];
            of.k.set(place(row, h, i) + d, normal(random));
            of.v.set(place(row, h, i) + d, normal(random));
          }
    for (int t = 0; t < c.tiers; ++t) {
      counts.push_back(filled<int32_t>(c.rows * lists, 0));
      for (int l = 0; l < c.rows * lists; ++l)
        counts[t][l] = std::min(std::max(count[l] - t * piece, 0), piece_width(t));
    }
    const size_t all = size_t(c.rows) * heads;
    logits = filled<float>(all * width, NAN);
    p = filled<float>(all * width, 0.25f);
    lse = filled<float>(all, NAN);
    product = filled<float>(all * c.head_dim, NAN);
    partials = filled<float>(all * c.splits * (c.head_dim + 2), NAN);
    tickets = filled<int32_t>(all, 0);
  }

  void point() {
    a.dtype = c.dtype;
    a.rows = c.rows, a.heads = heads, a.kv_heads = c.kv_heads, a.head_dim = c.head_dim;
    a.width = width, a.scale = 1 / std::sqrt(float(c.head_dim));
    a.q = q.bytes.get(), a.out = out.bytes.get();
    a.q_head = c.head_dim, a.q_row = heads * c.head_dim;
    a.tier_count = c.tiers;
    for (int t = 0; t < c.tiers; ++t) point(a.tiers[t], t);
    a.logits = logits.get(), a.lse = lse.get(), a.p = p.get(), a.error = &error;
    a.threads = 2, a.splits = c.splits;
    a.partials = partials.get(), a.tickets = tickets.get();
  }

  int piece_width(int t) const { return std::max(0, std::min(piece, width - t * piece)); }

  void point(Tier& t, int number) {
    t.k = pools[number].k.bytes.get(), t.v = pools[number].v.bytes.get();
    t.pool_slots = pool, t.width = piece_width(number), t.at = number * piece;
    t.k_head = t.v_head = c.head_dim, t.k_slot = t.v_slot = c.kv_heads * c.head_dim;
    t.slots = slots.get() + t.at, t.slots_row = lists * width;
    t.slots_list = c.per_head ? width : 0;
    t.count = counts[number].get(), t.count_row = lists, t.count_list = c.per_head;
  }

  double key(int row, int head, int i) const {
    double sum = 0;
    const size_t at = place(row, head / c.group, i);
    for (int d = 0; d < c.head_dim; ++d)
      sum += double(q.get((size_t(row) * heads + head) * c.head_dim + d)) *
             pools[i / piece].k.get(at + d);
    return sum;
  }
  double value(int row, int head, int i, int d) const {
    return pools[i / piece].v.get(place(row, head / c.group, i) + d);
  }
};

// got may differ from want by `limit`; NaN never passes.
void expect(const Case& c, const char* op, const char* what, double got, double want,
            double limit) {
  if (got == want || std::fabs(got - want) <= limit) return;
  mistake(c, op, what, std::fabs(got - want), limit);
}

void check_attention(const Problem& p) {
  const Case& c = p.c;
  const double half_ulp = c.dtype == DType::f32 ? 1e-6 : c.dtype == DType::f16 ? 5e-4 : 4e-3;
  for (int row = 0; row < c.rows; ++row)
    for (int head = 0; head < p.heads; ++head) {
      const int n = p.entries(row, head / c.group);
      const size_t at = size_t(row) * p.heads + head;
      std::vector<double> score(n), out(c.head_dim);
      double m = -INFINITY, l = 0;
      for (int i = 0; i < n; ++i) m = std::max(m, score[i] = p.key(row, head, i) * p.a.scale);
      for (int i = 0; i < n; ++i) l += std::exp(score[i] - m);
      for (int i = 0; i < n; ++i)
        for (int d = 0; d < c.head_dim; ++d)
          out[d] += std::exp(score[i] - m) / l * p.value(row, head, i, d);
      for (int d = 0; d < c.head_dim; ++d)
        expect(c, "attention", "out", p.out.get(at * c.head_dim + d), out[d],
               half_ulp * std::fabs(out[d]) + 1e-5);
      expect(c, "attention", "lse", p.lse[at], n ? m + std::log(l) : -INFINITY, 1e-4);
      for (int i = 0; i < p.width; ++i)
        expect(c, "attention", "logit", p.logits[at * p.width + i], i < n ? score[i] : -INFINITY,
               1e-4);
      if (p.tickets[at]) mistake(c, "attention", "ticket left at", p.tickets[at], 0);
    }
}

void check_products(const Problem& p) {
  for (int row = 0; row < p.c.rows; ++row)
    for (int head = 0; head < p.heads; ++head) {
      const int n = p.entries(row, head / p.c.group);
      const size_t at = size_t(row) * p.heads + head;
      for (int i = 0; i < p.width; ++i)
        expect(p.c, "qk", "score", p.logits[at * p.width + i],
               i < n ? p.key(row, head, i) : -INFINITY, 1e-4);
      for (int d = 0; d < p.c.head_dim; ++d) {
        double sum = 0;
        for (int i = 0; i < n; ++i) sum += 0.25 * p.value(row, head, i, d);
        expect(p.c, "pv", "sum", p.product[at * p.c.head_dim + d], sum, 1e-4);
      }
    }
}

void check(const Case& c) {
  const CpuKernels* cpu = c.isa ? cpu_kernels(c.isa) : nullptr;
  if (c.isa && !cpu) return;
  Problem p(c);
  for (int time = 0; time < 2; ++time) {  // twice: nothing may be left over
    std::memset(p.partials.get(), 0xff,
                sizeof(float) * p.heads * c.rows * c.splits * (c.head_dim + 2));
    cpu ? cpu->attention(p.a) : cuda_attention(p.a, nullptr);
    check_attention(p);
  }
  if (c.tiers == 1) {
    AttentionArgs qk = p.a, pv = p.a;
    qk.tiers[0].v = nullptr;
    pv.out = p.product.get();
    cpu ? cpu->qk(qk) : cuda_qk(qk, nullptr);
    cpu ? cpu->pv(pv) : cuda_pv(pv, nullptr);
    check_products(p);
  }
  if (p.error) mistake(c, "all", "error flag", p.error, 0);
  if (c.n == 0) return;
  const int last = (p.entries(0, 0) - 1) / p.piece;  // the last tier that the first list uses
  int32_t& slot = p.slots[last * p.piece];
  const int32_t good = slot;
  for (int32_t bad : {-1, p.pool, 1 << 30, -(1 << 30)}) {  // must be refused, and not be read
    slot = bad, p.error = 0;
    cpu ? cpu->attention(p.a) : cuda_attention(p.a, nullptr);
    if (p.error != 1 + last) mistake(c, "attention", "accepted slot", bad, p.pool);
  }
  slot = good, p.counts[last][0] = p.width + 1, p.error = 0;
  cpu ? cpu->attention(p.a) : cuda_attention(p.a, nullptr);
  if (p.error != 1 + last) mistake(c, "attention", "accepted count", p.width + 1, p.width);
}

// The products of few rows, and of many.
void check_products(const char* isa) {
  const CpuKernels* cpu = cpu_kernels(isa);
  for (DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (int rows = 1; cpu && rows <= 36; ++rows) {
      const bool few = rows <= 18;
      const int in = 67, out = 6, threads = 2;
      Numbers x(dtype, rows * in), w(dtype, out * in), bias(dtype, out), y(dtype, rows * out);
      for (size_t i = 0; i < x.size; ++i) x.set(i, float(int(i % 11) - 5));
      for (size_t i = 0; i < w.size; ++i) w.set(i, float(int(i % 7) - 3));
      bias.fill(2), y.fill(NAN);
      struct alignas(64) Line {
        float numbers[16];
      };
      const size_t bytes =
          few ? gemv_scratch(rows, in) * sizeof(float) : threads * cpu->gemm_scratch;
      std::unique_ptr<Line[]> scratch(new Line[bytes / sizeof(Line) + 1]);
      // The outputs in two parts, as two layers of one input.
      const int first = 4, number = dtype == DType::f32 ? 4 : 2;
      const GemvPart parts[] = {{first, w.bytes.get(), bias.bytes.get(), y.bytes.get()},
                                {out - first, w.bytes.get() + first * in * number, bias.bytes.get(),
                                 y.bytes.get() + rows * first * number}};
      (few ? cpu->gemv : cpu->gemm)(
          {dtype, dtype, rows, in, x.bytes.get(), in, parts, 2, scratch[0].numbers, threads});
      for (int r = 0; r < rows; ++r)
        for (int o = 0; o < out; ++o) {
          double want = 2;
          for (int i = 0; i < in; ++i) want += double(x.get(r * in + i)) * w.get(o * in + i);
          const Case c{dtype, rows, 0, 0, in, out, false, 0, 0, isa};
          const int at = o < first ? r * first + o : rows * first + r * (out - first) + o - first;
          expect(c, few ? "gemv" : "gemm", "y", y.get(at), want, std::fabs(want) / 128);
        }
    }
}

// The policy kernels, in the emulator or of an instruction set, against the CPU's as compiled here;
// weights are 0 or 1, so that sums are exact in any order.
void check_rank(const PolicyKernels& kernels, int width, int heads) {
  const int problems = 8, rows = 4, some = width / 3, half = width / 2, most = width - width / 4;
  const int first[] = {0, 0, some, 1, some, 0, 0, 0}, keep[] = {half, 0, half, 1, 0, 1, half, 0};
  const int last[] = {width, width, width, most, most, width, width, width};
  const int at[] = {width / 4, width, 0, width - 1, 0, 0, half, 0};
  const int wanted[] = {1, 1, width % 2, width > 1};
  std::mt19937 random(width + heads);
  auto logits = filled<float>(size_t(problems) * heads * width, 0);
  auto lse = filled<float>(problems * heads, 0);
  auto slots = filled<int32_t>(size_t(problems) * width, 0);
  for (int i = 0; i < problems * heads * width; ++i) logits[i] = random() % 2 ? -INFINITY : 0;
  for (int i = 0; i < problems * width; ++i) slots[i] = i * 5 + 3;
  std::unique_ptr<int32_t[]> out[2];
  int32_t error = 0;
  for (int side = 0; side < 2; ++side) {
    out[side] = filled<int32_t>(size_t(problems) * width, -7);
    RankArgs a{};
    a.problems = problems, a.rows = rows, a.heads = heads, a.width = width;
    a.logits = logits.get(), a.lse = lse.get(), a.slots = slots.get(), a.out = out[side].get();
    a.first = first, a.last = last, a.keep = keep, a.at = at, a.wanted = wanted;
    a.error = &error, a.threads = 1;
    const int status = side ? kernels.rank(a, nullptr) : plain::rank(a, nullptr);
    if (status != ok) mistake({}, "rank", "status", status, ok);
  }
  Case c{};
  c.n = width;
  for (int i = 0; i < problems * width; ++i)
    if (out[0][i] != out[1][i]) mistake(c, "rank", "slot", out[1][i], out[0][i]);
  if (error) mistake(c, "rank", "error flag", error, 0);
}

void check_age(const PolicyKernels& kernels, int places, int recent_tokens) {
  const int problems = 4, heads = 4, kv_heads = 2, width = places + 9, lines = problems * kv_heads;
  const int first[] = {0, 9, 3, 1}, used[] = {places - 1, places - 2}, budget[] = {places - 2, -1};
  const int recent[] = {recent_tokens, 0}, position[] = {places, places};
  const int64_t start[] = {100, 300, 500, 700};
  std::mt19937 random(places);
  auto logits = filled<float>(size_t(problems) * heads * width, 0);
  auto lse = filled<float>(problems * heads, 0);
  for (int i = 0; i < problems * heads * width; ++i) logits[i] = random() % 3 ? -INFINITY : 0;
  std::unique_ptr<float[]> scores[2];
  std::unique_ptr<int32_t[]> positions[2];
  std::unique_ptr<int64_t[]> write[2];
  int32_t error = 0;
  for (int side = 0; side < 2; ++side) {
    scores[side] = filled<float>(size_t(lines) * places, 0.5f);
    positions[side] = filled<int32_t>(size_t(lines) * places, 0);
    write[side] = filled<int64_t>(lines, -7);
    for (int i = 0; i < lines * places; ++i) positions[side][i] = i % places * 7 % places;
    AgeArgs a{};
    a.problems = problems, a.rows = 2, a.heads = heads, a.kv_heads = kv_heads, a.width = width;
    a.places = places, a.logits = logits.get(), a.lse = lse.get(), a.first = first;
    a.start = start, a.used = used, a.budget = budget, a.recent = recent, a.position = position;
    a.scores = scores[side].get(), a.positions = positions[side].get();
    a.write = write[side].get(), a.error = &error, a.threads = 1;
    const int status = side ? kernels.age(a, nullptr) : plain::age(a, nullptr);
    if (status != ok) mistake({}, "age", "status", status, ok);
  }
  Case c{};
  c.n = places;
  for (int i = 0; i < lines; ++i)
    if (write[0][i] != write[1][i]) mistake(c, "age", "write", write[1][i], write[0][i]);
  for (int i = 0; i < lines * places; ++i) {
    expect(c, "age", "score", scores[1][i], scores[0][i], 0);
    expect(c, "age", "position", positions[1][i], positions[0][i], 0);
  }
  if (error) mistake(c, "age", "error flag", error, 0);
}

void check_policy(const PolicyKernels& kernels) {
  for (int width : {1, 5, 256, 300, 1296})
    for (int heads : {1, 9}) check_rank(kernels, width, heads);
  check_age(kernels, 20, 5);
  check_age(kernels, 300, 0);
  check_age(kernels, 30, 30);
}

}  // namespace

using Attention = std::function<int(const AttentionArgs&)>;

// Tokens of pages in a buffer of exactly their size, all numbers alike: every mean of them is that
// number, whatever is left unread. Keys by channel are a quarter larger on every second page.
// Numbers by the definition are held to by tests/test_pages.py.
void check_pages(const char* name, const Attention& attention, DType key, DType value, int head_dim,
                 bool sifts) {
  const int kv_heads = 3, rows = 2, wide = (head_dim + 31) / 32 * 32;
  const int pages = 8, tokens = pages * PAGE - 21;
  auto side = [&](DType format, bool by_channel) {
    Side s{format, 0, 0, 0};
    if (format < DType::q8) s.codes = head_dim * (format == DType::f32 ? 4 : 2);
    if (format == DType::q8) s.codes = wide, s.scales = 2;
    if (format > DType::q8) s.codes = wide / (format == DType::q4 ? 2 : 4);
    if (format > DType::q8 && !by_channel) s.scales = 4 * wide / 32;
    s.block = (kv_heads * (s.codes + s.scales) + 15) / 16 * 16;
    return s;
  };
  const Side k = side(key, key == DType::q2), v = side(value, false);
  const size_t channels = key == DType::q2 ? 4 * kv_heads * wide : 0;
  const size_t page = PAGE * (k.block + v.block) + channels;
  auto data = filled<char>(pages * page, 0);
  const uint16_t eighth = from_float<fp16>(0.125f).bits, two = from_float<fp16>(2).bits;
  const float one = 0.125f;  // times 3 - 2 in q4 and q2
  for (int t = 0; t < pages * PAGE; ++t)
    for (const Side* s : {&k, &v}) {
      char* token = data.get() + t / PAGE * page + t % PAGE * s->block +
                    (s == &v ? PAGE * k.block + channels : 0);
      for (int h = 0; h < kv_heads; ++h) {
        char* codes = token + h * s->codes;
        if (s->format < DType::q8)
          for (int d = 0; d < head_dim; ++d) std::memcpy(codes + 4 * d, &one, 4);
        else
          std::memset(codes,
                      s->format == DType::q8   ? 1
                      : s->format == DType::q4 ? 0x33
                                               : 0xff,
                      s->codes);
        char* scales = token + kv_heads * s->codes + h * s->scales;
        if (s->scales) std::memcpy(scales, &eighth, 2);
        for (int r = 0; r < wide / 32 && s->scales > 2; ++r) {
          std::memcpy(scales + 2 * r, &eighth, 2);
          std::memcpy(scales + 2 * (wide / 32 + r), &two, 2);
        }
      }
    }
  for (size_t c = 0; c < channels / 4; ++c)
    for (int p = 0; p < pages; ++p) {
      char* head = data.get() + p * page + PAGE * k.block + c / wide * 4 * wide;
      const uint16_t scale = p % 2 ? from_float<fp16>(1.25f / 8).bits : eighth;
      std::memcpy(head + 2 * (c % wide), &scale, 2);
      std::memcpy(head + 2 * (wide + c % wide), &two, 2);
    }
  const size_t size = size_t(rows) * kv_heads * head_dim;
  auto q = filled<float>(size, 0.5f), out = filled<float>(size, NAN);
  auto lse = filled<float>(rows * kv_heads, NAN), mean = filled<float>(size, one);
  auto partials = filled<float>(2 * rows * kv_heads * (head_dim + 2), 0.0f);
  auto sieve = filled<float>(rows * kv_heads * tokens, NAN);
  auto chosen = filled<int32_t>(rows * kv_heads * tokens, 1 << 30);
  auto rest = filled<float>(rows * kv_heads * (MAX_TIERS + 1) * 2, NAN);
  auto tickets = filled<int32_t>(rows * kv_heads, 0);
  auto most = filled<float>(rows, 0.2f), spent = filled<float>(rows * kv_heads * 2, 0.0f);
  int32_t error = 0;
  AttentionArgs a{};
  a.dtype = DType::f32, a.rows = rows, a.heads = a.kv_heads = kv_heads, a.head_dim = head_dim;
  a.width = tokens, a.tier_count = 1, a.scale = 1, a.q = q.get(), a.out = out.get();
  a.q_row = kv_heads * head_dim, a.q_head = head_dim, a.lse = lse.get(), a.error = &error;
  a.threads = 2, a.splits = sifts ? 2 : 1, a.partials = partials.get();
  a.tickets = tickets.get(), a.sieve = sieve.get();
  Tier& t = a.tiers[0];
  t.k = data.get(), t.v = data.get() + PAGE * k.block + channels;
  t.pool_slots = pages * PAGE, t.width = tokens, t.paged = 1, t.key = k, t.value = v, t.page = page;
  if (sifts) {
    t.sifting = {most.get(), mean.get(), spent.get(), kv_heads * head_dim, 2 * kv_heads};
    a.chosen = chosen.get(), a.rest = rest.get();
  } else if (name) {
    a.sieve = nullptr;  // which tells a CPU that nothing is sifted
  }
  const Case c{DType::f32, rows, kv_heads, 1, head_dim, tokens, false, 2, 1, name};
  expect(c, "pages", "status", attention(a), 0, 0);
  for (size_t i = 0; i < size; ++i) expect(c, "pages", "out", out[i], one, 1e-5);
  const float logit = 0.5f * one * head_dim, second = channels ? 1.25f * logit : logit;
  const int half = pages / 2 * PAGE;
  const float all = std::log(half * std::exp(logit) + (tokens - half) * std::exp(second));
  for (int i = 0; i < rows * kv_heads; ++i) expect(c, "pages", "lse", lse[i], all, 1e-3);
  for (int i = 0; i < rows * kv_heads; ++i)
    if (tickets[i]) mistake(c, "pages", "ticket left at", tickets[i], 0);
}

// In the emulator fewer sizes, and each case with some order of the threads.
void check_pages(const char* name, const Attention& attention) {
  const std::vector<int> few = {16, 80, 128}, all = {16, 32, 64, 80, 96, 128};
  std::mt19937 random(1);
  for (DType key : {DType::f32, DType::q8, DType::q4, DType::q2})
    for (DType value : {DType::f32, DType::q8, DType::q4, DType::q2})
      for (int head_dim : name ? all : few)
        for (bool sifts : {false, true}) {
          emulator::order = random() % 3;
          check_pages(name, attention, key, value, head_dim, sifts);
        }
}

int main(int argc, char** argv) {
  const std::string which = argc > 1 ? argv[1] : "emulated";
  const Case shapes[] = {
      // dtype, rows, kv heads, group, size, n, per head, splits, tiers
      {DType::bf16, 2, 2, 1, 128, 65, false, 1, 1, nullptr},
      {DType::bf16, 1, 1, 1, 128, 300, false, 2, 1, nullptr},
      {DType::f32, 2, 2, 4, 64, 7, true, 2, 1, nullptr},
      {DType::f16, 1, 2, 7, 96, 64, true, 2, 1, nullptr},
      {DType::f32, 2, 1, 2, 16, 1, false, 2, 1, nullptr},
      {DType::bf16, 1, 2, 1, 32, 0, false, 2, 1, nullptr},
      {DType::f32, 2, 2, 1, 80, 40, false, 1, 1, nullptr},
      {DType::bf16, 2, 1, 3, 64, 63, true, 1, 2, nullptr},
      {DType::f16, 2, 2, 2, 128, 130, false, 2, 3, nullptr},
      {DType::f32, 1, 2, 1, 32, 2, true, 2, 4, nullptr},
  };
  for (Case c : shapes) {
    if (which == "cpu") {
      c.splits = 2;
      for (const char* isa : ISAS) c.isa = isa, check(c);
    } else {
      for (emulator::order = 0; emulator::order < 3; ++emulator::order) check(c);
    }
  }
  if (which == "cpu")
    for (const char* isa : ISAS)
      if (const CpuKernels* kernels = cpu_kernels(isa))
        check_products(isa), check_policy(kernels->policy), check_pages(isa, kernels->attention);
#ifndef AVL_CPU_ONLY
  for (emulator::order = 0; which != "cpu" && emulator::order < 3; ++emulator::order)
    check_policy({cuda_rank, cuda_age});
  if (which != "cpu")
    check_pages(nullptr, [](const AttentionArgs& a) { return cuda_attention(a, nullptr); });
#endif
  std::printf("%s: %d mistakes\n", which.c_str(), mistakes);
  return mistakes > 0;
}
