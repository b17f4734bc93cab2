// Layers with a tangent: layer norm, noise, residual and ReLU in one pass, and the gradient of the noise's activity.
#pragma once
#include "forward_gradient/cpu/norm.h"

namespace lgk::cpu::LGK_ISA {

constexpr int64_t kChunk = 1024;         // elements whose noise is made together
constexpr int64_t kPanel = 128;          // most columns that are normalized side by side
constexpr int64_t kPanelSize = 1 << 17;  // elements of such a panel

// Noise of `sample` elements a sample: a tensor, or a law whose rows are samples.
struct Noise {
  const Array& values;
  const Formula& law;
  int64_t sample;

  bool exists() const { return values.data || law.state; }
  static int64_t space(int64_t count) { return 2 * (count + 128 + 2 * V); }  // of a buffer

  // Elements [flat, flat + count) of the whole tensor.
  const float* of(int64_t flat, int64_t count, float* buffer) const {
    if (values.data) return widened(values, flat, count, buffer);
    float* draft = buffer + count + 128 + 2 * V;
    for (int64_t done = 0; done < count;) {
      const int64_t row = (flat + done) / sample, col = (flat + done) % sample;
      const int64_t n = smaller(count - done, sample - col);
      const float* made = of_row(row, col, n, draft);
      if (n == count) return made;
      std::memcpy(buffer + done, made, n * sizeof(float));
      done += n;
    }
    return buffer;
  }

 private:
  // A row can be made from the first column of a Philox call on.
  const float* of_row(int64_t row, int64_t col, int64_t n, float* buffer) const {
    const int64_t call = law.law == kSign ? 128 : law.law == kUniform8 ? 16 : 4, start = col / call * call;
    for (int64_t j = start; j < col + n; j += kSegment)
      law_row(law, row, j, smaller(kSegment, col + n - j), buffer + (j - start));
    return buffer + (col - start);
  }
};

// What becomes of the norm and its derivative at the elements of a chunk.
struct DualChunk {
  const float *residual, *noise;  // or null
  float *y, *tangent;             // tangent may be null
  bool relu, streamed;

  LGK_INLINE void finish(int64_t at, int64_t n, vf zh, vf v) const {
    vf out = zh;
    if (residual) out += load_some(residual + at, n);
    if (relu) out = out < 0.f ? vf{} : out;  // nan stays
    put(y + at, out, n, streamed);
    if (!tangent) return;
    if (noise) v += load_some(noise + at, n);
    if (relu) v *= out > 0.f ? splat(1.f) : vf{};
    put(tangent + at, v, n, streamed);
  }
};

// Gives the chunks of a pass their places.
struct DualOutputs {
  const Array &z, &residual;
  const Noise& noise;
  void *y, *tangent;
  bool relu, streamed;
  int64_t space;  // of each of four buffers

  DualChunk chunk(int64_t flat, int64_t count, float* buffers) const {
    return {residual.data ? widened(residual, flat, count, buffers) : nullptr,
            noise.exists() ? noise.of(flat, count, buffers + 3 * space) : nullptr,
            room(y, z.dtype, flat, buffers + space),
            tangent ? room(tangent, z.dtype, flat, buffers + 2 * space) : nullptr,
            relu,
            streamed};
  }
  void finish(const DualChunk& c, int64_t flat, int64_t count) const {
    narrowed(c.y, y, z.dtype, flat, count);
    if (tangent) narrowed(c.tangent, tangent, z.dtype, flat, count);
  }
};

template <bool V_TOO>
LGK_INLINE void norm_rows(const float* z, const float* v, int64_t rows, int64_t length, float eps, const DualChunk& c) {
  for (int64_t i = 0; i < rows; i += V) {
    LaneMoments m;
    const int64_t count = smaller(V, rows - i);
    row_moments<V_TOO>(z + i * length, v + i * length, count, length, eps, &m);
    for (int64_t k = 0; k < count; ++k)
      for_vectors(length, [&](int64_t j, int64_t n) LGK_INLINE_LAMBDA {
        const int64_t at = (i + k) * length + j;
        const vf d = load_some(z + at, n) - m.mean[k];
        vf derivative = {};
        if (V_TOO) derivative = (load_some(v + at, n) - m.v_mean[k] - d * m.along[k]) * m.r[k];
        c.finish(at, n, d * m.r[k], derivative);
      });
  }
}

inline int dual_rows(const NormShape& s, const Array& z, const Array& z_tangent, const DualOutputs& out, int threads) {
  const int64_t at_once = rows_at_once(s.length, kChunk), space = at_once * s.length + 2 * V;
  Scratch own(2 * space + 3 * out.space + Noise::space(space), threads);
  if (!own) return 1;
  parallel((s.outer + at_once - 1) / at_once, s.outer * s.length, threads, [&](int64_t begin, int64_t end, int thread) {
    float* buffer = own.of(thread);
    for (int64_t row = begin * at_once; row < smaller(s.outer, end * at_once); row += at_once) {
      const int64_t rows = smaller(at_once, s.outer - row), flat = row * s.length, count = rows * s.length;
      const float* from = widened(z, flat, count, buffer);
      const DualChunk chunk = out.chunk(flat, count, buffer + 2 * space);
      if (z_tangent.data)
        norm_rows<true>(from, widened(z_tangent, flat, count, buffer + space), rows, s.length, s.eps, chunk);
      else
        norm_rows<false>(from, from, rows, s.length, s.eps, chunk);
      out.finish(chunk, flat, count);
    }
    stream_fence();
  });
  return 0;
}

// -- columns: the norm's dimension is not the last ----------------------------------------------------------------

struct Panels {
  int64_t width, across;
  explicit Panels(const NormShape& s) {
    const int64_t fitting = kPanelSize / s.length / 16 * 16;
    width = smaller(s.inner, fitting < 16 ? 16 : smaller(fitting, kPanel));
    across = (s.inner + width - 1) / width;
  }
};

// A panel of columns as floats: where it lies, or widened.
struct Panel {
  const float* data;
  int64_t stride;
  Panel(const Array& x, int64_t flat, int64_t length, int64_t inner, int64_t width, float* buffer) {
    const bool here = x.dtype == kFloat32;
    stride = here ? inner : width;
    data = here ? static_cast<const float*>(x.data) + flat : buffer;
    if (here) return;
    if (width == inner)
      widened(x, flat, length * inner, buffer);
    else
      for (int64_t l = 0; l < length; ++l) widened(x, flat + l * inner, width, buffer + l * width);
  }
};

// visit(first element, width, buffer) of every panel
template <class Visit>
inline int for_panels(const NormShape& s, int64_t space, int threads, const Visit& visit) {
  const Panels panels(s);
  Scratch own(space, threads);
  if (!own) return 1;
  parallel(s.outer * panels.across, s.outer * s.length * s.inner, threads, [&](int64_t begin, int64_t end, int thread) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t column = i % panels.across * panels.width;
      visit(i / panels.across * s.length * s.inner + column, smaller(panels.width, s.inner - column), own.of(thread));
    }
    stream_fence();
  });
  return 0;
}

// visit(first row, rows) over rows of a panel that lie in one piece
template <class Visit>
LGK_INLINE void for_pieces(const NormShape& s, int64_t width, const Visit& visit) {
  const int64_t rows = width == s.inner && width < kChunk ? kChunk / width : 1;
  for (int64_t l = 0; l < s.length; l += rows) visit(l, smaller(rows, s.length - l));
}

template <bool V_TOO>
LGK_INLINE void norm_columns(const NormShape& s, const Panel& z, const Panel& v, int64_t flat, int64_t width,
                             const DualOutputs& out, float* buffer) {
  NormMoments<kPanel> m;
  column_moments<V_TOO>(z.data, z.stride, v.data, v.stride, s.length, width, s.eps, &m);
  for_pieces(s, width, [&](int64_t first_row, int64_t rows) {
    const int64_t start = flat + first_row * s.inner;
    const DualChunk chunk = out.chunk(start, rows * width, buffer);
    for (int64_t l = 0; l < rows; ++l)
      for_vectors(width, [&](int64_t j, int64_t n) LGK_INLINE_LAMBDA {
        const vf d = load_some(z.data + (first_row + l) * z.stride + j, n) - load(m.mean + j), r = load(m.r + j);
        vf derivative = {};
        if (V_TOO) {
          const vf w = load_some(v.data + (first_row + l) * v.stride + j, n) - load(m.v_mean + j);
          derivative = (w - d * load(m.along + j)) * r;
        }
        chunk.finish(l * width + j, n, d * r, derivative);
      });
    out.finish(chunk, start, rows * width);
  });
}

inline int dual_columns(const NormShape& s, const Array& z, const Array& z_tangent, const DualOutputs& out,
                        int threads) {
  const int64_t size = s.length * Panels(s).width + 2 * V;
  return for_panels(s, 2 * size + 3 * out.space + Noise::space(out.space), threads,
                    [&](int64_t flat, int64_t width, float* buffer) {
                      const Panel from(z, flat, s.length, s.inner, width, buffer);
                      float* rest = buffer + 2 * size;
                      if (z_tangent.data) {
                        const Panel v(z_tangent, flat, s.length, s.inner, width, buffer + size);
                        norm_columns<true>(s, from, v, flat, width, out, rest);
                      } else {
                        norm_columns<false>(s, from, from, flat, width, out, rest);
                      }
                    });
}

inline int dual_norm(const NormShape& s, const Array& z, const Array& z_tangent, const Array& residual,
                     const Array& values, const Formula& law, void* y, void* y_tangent, int threads) {
  const Noise noise{values, law, s.sample};
  const int64_t row = s.inner == 1 ? s.length : s.inner, size = s.outer * s.length * s.inner;
  const bool streamed = streams(y, z.dtype, row, size) && (!y_tangent || streams(y_tangent, z.dtype, row, size));
  const int64_t space = (s.inner == 1 && s.length > kChunk ? s.length : kChunk) + 2 * V;
  const DualOutputs out{z, residual, noise, y, y_tangent, s.relu, streamed, space};
  return s.inner == 1 ? dual_rows(s, z, z_tangent, out, threads) : dual_columns(s, z, z_tangent, out, threads);
}

// -- the gradient of z ----------------------------------------------------------------------------------------------

// v = noise, where y > 0 if there is a ReLU
inline void masked(const float* noise, const float* y, int64_t n, float* v) {
  for_vectors(n, [&](int64_t j, int64_t some) LGK_INLINE_LAMBDA {
    vf value = load_some(noise + j, some);
    if (y) value *= load_some(y + j, some) > 0.f ? splat(1.f) : vf{};
    store_some(v + j, value, some);
  });
}

inline void scale(float* v, int64_t n, float factor) {
  for (int64_t j = 0; j < n; ++j) v[j] *= factor;
}

inline int activity_rows(const NormShape& s, const Array& z, const Array& y, const float* coefficient, int64_t runs,
                         const Noise& noise, void* out, int threads) {
  const int64_t at_once = rows_at_once(s.length, kChunk), space = at_once * s.length + 2 * V, run = s.length / runs;
  const bool streamed = streams(out, z.dtype, s.length, s.outer * s.length);
  Scratch own(4 * space + Noise::space(space), threads);
  if (!own) return 1;
  parallel((s.outer + at_once - 1) / at_once, s.outer * s.length, threads, [&](int64_t begin, int64_t end, int thread) {
    float *buffer = own.of(thread), *v = buffer + space;
    for (int64_t row = begin * at_once; row < smaller(s.outer, end * at_once); row += at_once) {
      const int64_t rows = smaller(at_once, s.outer - row), flat = row * s.length, count = rows * s.length;
      const float* from = widened(z, flat, count, buffer);
      const float* mask = s.relu ? widened(y, flat, count, buffer + 2 * space) : nullptr;
      masked(noise.of(flat, count, buffer + 4 * space), mask, count, v);
      for (int64_t i = 0; i < rows * runs; ++i) scale(v + i * run, run, coefficient[row * runs + i]);
      float* to = room(out, z.dtype, flat, buffer + 3 * space);
      for (int64_t i = 0; i < rows; i += V) {
        LaneMoments m;
        const int64_t some = smaller(V, rows - i);
        row_moments<true>(from + i * s.length, v + i * s.length, some, s.length, s.eps, &m);
        for (int64_t k = 0; k < some; ++k)
          for_vectors(s.length, [&](int64_t j, int64_t n) LGK_INLINE_LAMBDA {
            const int64_t at = (i + k) * s.length + j;
            const vf d = load_some(from + at, n) - m.mean[k];
            put(to + at, (load_some(v + at, n) - m.v_mean[k] - d * m.along[k]) * m.r[k], n, streamed);
          });
      }
      narrowed(to, out, z.dtype, flat, count);
    }
    stream_fence();
  });
  return 0;
}

inline int activity_columns(const NormShape& s, const Array& z, const Array& y, const float* coefficient, int64_t runs,
                            const Noise& noise, void* out, int threads) {
  const int64_t size = s.length * Panels(s).width + 2 * V, space = kChunk + 2 * V, run = s.length / runs;
  const bool streamed = streams(out, z.dtype, s.inner, s.outer * s.length * s.inner);
  return for_panels(s, 2 * size + 2 * space + Noise::space(space), threads,
                    [&](int64_t flat, int64_t width, float* buffer) {
                      const Panel from(z, flat, s.length, s.inner, width, buffer);
                      float *v = buffer + size, *rest = buffer + 2 * size;
                      const int64_t column = flat % s.inner, outer = flat / (s.length * s.inner);
                      for_pieces(s, width, [&](int64_t row, int64_t rows) {
                        const int64_t start = flat + row * s.inner, count = rows * width;
                        const float* mask = s.relu ? widened(y, start, count, rest) : nullptr;
                        masked(noise.of(start, count, rest + 2 * space), mask, count, v + row * width);
                        for (int64_t l = row; l < row + rows; ++l) {
                          const float* factor = coefficient + (outer * runs + l / run) * s.inner + column;
                          for (int64_t j = 0; j < width; ++j) v[l * width + j] *= factor[j];
                        }
                      });
                      NormMoments<kPanel> m;
                      column_moments<true>(from.data, from.stride, v, width, s.length, width, s.eps, &m);
                      for_pieces(s, width, [&](int64_t first_row, int64_t rows) {
                        const int64_t start = flat + first_row * s.inner;
                        float* to = room(out, z.dtype, start, rest + space);
                        for (int64_t l = 0; l < rows; ++l)
                          for_vectors(width, [&](int64_t j, int64_t n) LGK_INLINE_LAMBDA {
                            const vf d = load_some(from.data + (first_row + l) * from.stride + j, n) - load(m.mean + j);
                            const vf w = load_some(v + (first_row + l) * width + j, n) - load(m.v_mean + j);
                            put(to + l * width + j, (w - d * load(m.along + j)) * load(m.r + j), n, streamed);
                          });
                        narrowed(to, out, z.dtype, start, rows * width);
                      });
                    });
}

inline int activity_grad(const NormShape& s, const Array& z, const Array& y, const float* coefficient, int64_t runs,
                         const Array& values, const Formula& law, void* out, int threads) {
  const Noise noise{values, law, s.sample};
  return s.inner == 1 ? activity_rows(s, z, y, coefficient, runs, noise, out, threads)
                      : activity_columns(s, z, y, coefficient, runs, noise, out, threads);
}

}  // namespace lgk::cpu::LGK_ISA
