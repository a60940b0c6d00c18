// What a stage does on a CPU, in four operators of C++; each gives what a function of PyTorch's operators gives.
//
// One pass an image, images side by side: its tokens are read in their own dtype, compared and added up in float32
// while they lie in the cache, and written once. Sums have a fixed order, so a result does not change from run to run.
// The operators are those of `tpbook/kernels/stage.py`, which does the same on a GPU, and `cpu.py` builds them.
//
// Letters are the shapes': B images, H heads, T tokens, D channels a head, C channels, P = `first` prefix tokens,
// n patch tokens, k = `kept` of them, p = n - k others.

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <vector>

using at::Tensor;

namespace {

#define OF_ITS_TYPE(tensor, ...) \
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, (tensor).scalar_type(), "tpbook", __VA_ARGS__)

template <typename number>
float dot(const float* x, const number* y, int64_t size) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < size; ++i) sum += x[i] * static_cast<float>(y[i]);
  return sum;
}

// y += weight x
template <typename number>
void add(float* y, const number* x, float weight, int64_t size) {
  for (int64_t i = 0; i < size; ++i) y[i] += weight * static_cast<float>(x[i]);
}

// x *= y, and the largest
float scale(float* x, const float* y, int64_t size) {
  float top = -INFINITY;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < size; ++i) {
    x[i] *= y[i];
    top = std::max(top, x[i]);
  }
  return top;
}

template <typename to, typename from>
void copy(to* y, const from* x, int64_t size, float weight = 1) {
  for (int64_t i = 0; i < size; ++i) y[i] = static_cast<to>(static_cast<float>(x[i]) * weight);
}

// x, copied only where what its last index counts does not lie side by side.
Tensor last(const Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// Tokens (B, P + n, C) and an order of the n, which may come from anywhere: what is not there is not read.
void check(const Tensor& x, const Tensor& order, int64_t kept, int64_t first, int64_t listed) {
  TORCH_CHECK(x.dim() == 3 && order.dim() == 2 && order.scalar_type() == at::kLong && order.size(0) == x.size(0),
              "tokens must be (B, P + n, C) and order (B, n) int64, got ", x.sizes(), " and ", order.sizes());
  const int64_t n = x.size(1) - first;
  TORCH_CHECK(0 <= first && 0 <= kept && kept <= n && listed <= order.size(1),
              "order must list at least ", listed, " of ", n, " tokens of which ", kept, " are kept, got ", order.sizes());
  const int64_t* index = order.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < order.numel(); ++i)
    TORCH_CHECK_INDEX(0 <= index[i] && index[i] < n, "order must hold positions from 0 to ", n - 1, ", got ", index[i]);
}

// softmax(q_cls K^T scale), mean over heads: q (B, H, >= 1, D), k (B, H, T, D) -> (B, T) float32.
Tensor row(const Tensor& given_q, const Tensor& given_k, double scale) {
  const Tensor q = last(given_q), k = last(given_k);
  const int64_t B = k.size(0), H = k.size(1), T = k.size(2), D = k.size(3);
  TORCH_CHECK(q.dim() == 4 && q.size(0) == B && q.size(1) == H && q.size(3) == D && q.dtype() == k.dtype(),
              "queries and keys must be (B, H, T, D) of one dtype, got ", q.sizes(), " and ", k.sizes());
  Tensor out = at::empty({B, T}, k.options().dtype(at::kFloat));
  OF_ITS_TYPE(k, [&] {
    const scalar_t *queries = q.const_data_ptr<scalar_t>(), *keys = k.const_data_ptr<scalar_t>();
    float* means = out.data_ptr<float>();
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> query(D), share(T);
      for (int64_t b = begin; b < end; ++b) {
        float* mean = means + b * T;
        std::fill_n(mean, T, 0.f);
        for (int64_t h = 0; h < H; ++h) {
          copy(query.data(), queries + b * q.stride(0) + h * q.stride(1), D, static_cast<float>(scale));
          const scalar_t* key = keys + b * k.stride(0) + h * k.stride(1);
          for (int64_t t = 0; t < T; ++t) share[t] = dot(query.data(), key + t * k.stride(2), D);
          const float top = *std::max_element(share.begin(), share.end());
          for (float& x : share) x = std::exp(x - top);
          add(mean, share.data(), 1 / (H * std::accumulate(share.begin(), share.end(), 0.f)), T);
        }
      }
    });
  });
  return out;
}

// Positions of the k best of scores (B, n), of equal ones the earlier first, NaN the highest -> (B, k) int64.
Tensor rank(const Tensor& scores, int64_t k, bool invert) {
  const int64_t B = scores.size(0), n = scores.size(1);
  TORCH_CHECK(0 <= k && k <= n, "k must be from 0 to ", n, ", the number of scores, got ", k);
  Tensor out = at::empty({B, k}, scores.options().dtype(at::kLong));
  OF_ITS_TYPE(scores, [&] {
    const scalar_t* score = scores.const_data_ptr<scalar_t>();
    int64_t* order = out.data_ptr<int64_t>();
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      std::vector<uint64_t> keys(n);  // a score whose bits rise as it falls, then its position
      for (int64_t b = begin; b < end; ++b) {
        for (int64_t i = 0; i < n; ++i) {
          float x = static_cast<float>(score[b * scores.stride(0) + i * scores.stride(1)]) + 0.f;  // no -0
          x = std::isnan(x) ? INFINITY : x;
          x = invert ? 0.f - x : x;
          uint32_t bits;
          std::memcpy(&bits, &x, sizeof bits);
          bits = bits >> 31 ? bits : bits ^ 0x7fffffffu;
          keys[i] = static_cast<uint64_t>(bits) << 32 | static_cast<uint64_t>(i);
        }
        std::partial_sort(keys.begin(), keys.begin() + k, keys.end());
        for (int64_t i = 0; i < k; ++i) order[b * k + i] = keys[i] & 0xffffffffu;
      }
    });
  });
  return out;
}

// The first P tokens, the kept ones in their order, and with weights (B, n) one that sums the others by theirs
// -> (B, P + k, C), or (B, P + k + 1, C).
Tensor collect(const Tensor& given_x, const Tensor& given_order, int64_t kept, int64_t first,
               const std::optional<Tensor>& weights) {
  const Tensor x = last(given_x), order = given_order.contiguous();
  const int64_t B = x.size(0), n = x.size(1) - first, C = x.size(2), stay = first + kept;
  check(x, order, kept, first, weights ? n : kept);
  const Tensor weight = weights ? weights->to(at::kFloat).contiguous() : Tensor();
  Tensor out = at::empty({B, stay + (weights ? 1 : 0), C}, x.options());
  OF_ITS_TYPE(x, [&] {
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> sum(C);
      for (int64_t b = begin; b < end; ++b) {
        const scalar_t* token = x.const_data_ptr<scalar_t>() + b * x.stride(0);
        const int64_t* index = order.const_data_ptr<int64_t>() + b * order.size(1);
        scalar_t* y = out.data_ptr<scalar_t>() + b * out.stride(0);
        for (int64_t t = 0; t < stay; ++t)
          std::copy_n(token + (t < first ? t : first + index[t - first]) * x.stride(1), C, y + t * C);
        if (!weights) continue;
        std::fill(sum.begin(), sum.end(), 0.f);
        for (int64_t i = kept; i < n; ++i)
          add(sum.data(), token + (first + index[i]) * x.stride(1), weight.const_data_ptr<float>()[b * n + index[i]], C);
        copy(y + stay * C, sum.data(), C);
      }
    });
  });
  return out;
}

// The others join the most similar of the kept tokens: (B, P + k, C) tokens, and (B, p) hosts, positions among the k.
std::tuple<Tensor, Tensor> squeeze(const Tensor& given_x, const Tensor& given_order, int64_t kept, int64_t first) {
  const Tensor x = last(given_x), order = given_order.contiguous();
  const int64_t B = x.size(0), n = x.size(1) - first, C = x.size(2), k = kept, p = n - k;
  check(x, order, kept, first, n);
  TORCH_CHECK(k > 0, "kept must be at least 1, since somebody has to be the host");
  Tensor out = at::empty({B, first + k, C}, x.options()), hosts = at::empty({B, p}, order.options());
  OF_ITS_TYPE(x, [&] {
    at::parallel_for(0, B, 1, [&](int64_t begin, int64_t end) {
      const auto floats = x.options().dtype(at::kFloat);
      Tensor tokens = at::empty({n, C}, floats), products = at::empty({p, k}, floats);
      float* token = tokens.data_ptr<float>();  // hosts, then guests
      std::vector<float> inverse(n), total(k);
      for (int64_t b = begin; b < end; ++b) {
        const scalar_t* from = x.const_data_ptr<scalar_t>() + b * x.stride(0);
        const int64_t* index = order.const_data_ptr<int64_t>() + b * order.size(1);
        scalar_t* y = out.data_ptr<scalar_t>() + b * out.stride(0);
        for (int64_t i = 0; i < n; ++i) {
          copy(token + i * C, from + (first + index[i]) * x.stride(1), C);
          inverse[i] = 1 / (std::sqrt(dot(token + i * C, token + i * C, C)) + 1e-6f);
        }
        at::mm_out(products, tokens.narrow(0, k, p), tokens.narrow(0, 0, k).t());
        std::fill(total.begin(), total.end(), 1.f);
        for (int64_t i = 0; i < p; ++i) {
          float* product = products.data_ptr<float>() + i * k;
          const float top = scale(product, inverse.data(), k);  // c times the guest's length, the same for every host
          const int64_t found = std::find(product, product + k, top) - product, host = found < k ? found : 0;  // NaN
          const float weight = std::exp(top * inverse[k + i] - 1);
          add(token + host * C, token + (k + i) * C, weight, C);
          total[host] += weight;
          hosts.data_ptr<int64_t>()[b * p + i] = host;
        }
        for (int64_t t = 0; t < first; ++t) std::copy_n(from + t * x.stride(1), C, y + t * C);
        for (int64_t j = 0; j < k; ++j) copy(y + (first + j) * C, token + j * C, C, 1 / total[j]);
      }
    });
  });
  return {out, hosts};
}

}  // namespace

TORCH_LIBRARY(tpbook, m) {
  m.def("row(Tensor q, Tensor k, float scale) -> Tensor");
  m.def("rank(Tensor scores, int k, bool invert=False) -> Tensor");
  m.def("collect(Tensor x, Tensor order, int kept, int first=0, Tensor? weights=None) -> Tensor");
  m.def("squeeze(Tensor x, Tensor order, int kept, int first=0) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(tpbook, CPU, m) {
  m.impl("row", &row);
  m.impl("rank", &rank);
  m.impl("collect", &collect);
  m.impl("squeeze", &squeeze);
}
