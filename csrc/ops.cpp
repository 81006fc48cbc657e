// Every op of fastdiff: its schema, one line each, and what is asked of the library itself. No arithmetic, no Python.
// What the arguments mean stands in fastdiff/ops/<op>.py.

#include <string>

#include "cpu/capability.h"
#include "tensors.h"

STABLE_TORCH_LIBRARY(fastdiff, m) {
  m.def("encode_last_item(Tensor items, Tensor lengths, Tensor item_table, Tensor weights, int window, int outputs, int pad_id, float eps) -> Tensor");
  m.def("encode_interests(Tensor items, Tensor lengths, Tensor item_table, Tensor? weights, int window, int hidden, int interests, int pad_id, bool positions_in_values) -> Tensor");
  m.def("row_linear(Tensor x, Tensor weights, int n_out) -> Tensor");
  m.def("sample_affine(Tensor cond, Tensor? uncond, float guidance_scale, Tensor weights, Tensor? z, int seed, Tensor? row_key, Tensor? sample) -> Tensor");
  m.def("denoise_mlp_loop(Tensor? x_t, Tensor network, Tensor steps, int dim, Tensor cond, Tensor? uncond, float guidance_scale, Tensor? noise, int seed, Tensor? row_key, Tensor? sample) -> Tensor");
  m.def("encode_causal_history(Tensor items, Tensor lengths, Tensor item_table, Tensor norm_weight, Tensor norm_bias, float norm_eps, Tensor[] blocks, int hidden, int heads, float eps, Tensor pads, Tensor pad_output, int window, bool only_last) -> (Tensor, Tensor)");
  m.def("prepare_causal_prefix(Tensor condition, Tensor items, Tensor lengths, Tensor item_table, float input_scale, bool normalize, Tensor time, Tensor[] blocks, int hidden, int heads, float eps, Tensor pads, int window, bool guided) -> (Tensor, Tensor, Tensor)");
  m.def("denoise_attention_loop(Tensor x_t, Tensor[] blocks, int hidden, int heads, float eps, Tensor cond, Tensor keys_values, Tensor lengths, Tensor pad, Tensor log_pads, Tensor? uniform, float guidance_scale, float input_scale, Tensor time, Tensor coef, bool normalize, Tensor? noise, int seed, Tensor? row_key, Tensor? sample) -> Tensor");
  m.def("encode_padded_history(Tensor items, Tensor lengths, Tensor item_table, Tensor positions, Tensor norm_weight, Tensor norm_bias, Tensor[] blocks, int hidden, int heads, bool gelu, float eps, int pad_id, Tensor empty) -> Tensor");
  m.def("decode_context(Tensor context, Tensor weights, int heads, bool coupled, bool gelu, float eps, Tensor cross, Tensor coef, bool normalize, int num_samples, Tensor? x_t, int first_draw, Tensor? noise, int seed, Tensor? row_key, Tensor? sample) -> Tensor");
  m.def("philox_normals(int seed, Tensor row_key, Tensor sample, int first_draw, int n_draws, int dim) -> Tensor");
  m.def("score_topk(Tensor query, Tensor item_emb, int k, Tensor? allowed, Tensor? exclude, Tensor? exclude_offsets, Tensor? candidates, Tensor? candidate_offsets, int stored, Tensor[] chunks, Tensor bounds, bool certified) -> (Tensor, Tensor)");
  m.def("topk_pack(Tensor item_emb, int stored) -> (Tensor, Tensor)");
  m.def("sampler_step(Tensor model_output, Tensor x_t, Tensor? noise, float c_out, float c_xt, float c_noise, bool normalize) -> Tensor");
}

// --- questions to the library, for ctypes: they take and give no tensors ---------------------------------------------

#define FASTDIFF_EXPORT extern "C" __attribute__((visibility("default")))

// The level in use; null where FASTDIFF_CPU_CAPABILITY names none that this machine has.
FASTDIFF_EXPORT const char* fastdiff_cpu_capability() {
  try {
    return fastdiff::level_name(fastdiff::level());
  } catch (const std::exception&) {
    return nullptr;
  }
}

FASTDIFF_EXPORT const char* fastdiff_cpu_highest() { return fastdiff::level_name(fastdiff::highest_level()); }

// An empty name is the highest level. Returns what is wrong, or null.
FASTDIFF_EXPORT const char* fastdiff_set_cpu_capability(const char* name) {
  static thread_local std::string wrong;
  try {
    fastdiff::set_level(name);
    return nullptr;
  } catch (const std::exception& error) {
    wrong = error.what();
    return wrong.c_str();
  }
}
