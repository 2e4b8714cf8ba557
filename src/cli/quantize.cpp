// octomoe quantize IN OUT --scheme S: writes a checkpoint with quantised experts.
#include <fmt/format.h>

#include <filesystem>
#include <memory>

#include "cli/arguments.h"
#include "cli/cli.h"
#include "cli/harness.h"
#include "cli/table.h"
#include "cli/terminal.h"
#include "cli/usage_error.h"
#include "octomoe/checkpoint.h"

namespace octomoe::cli {
namespace {

namespace fs = std::filesystem;

struct QuantizeOptions {
  std::string in, out, scheme, calibration, max_shard_size = "5GiB";
  int threads = 0;
  bool overwrite = false;
};

// Bytes of the .safetensors files of a folder, or of one file.
double tensor_bytes(const std::string& path) {
  std::error_code ec;
  if (fs::is_regular_file(path, ec)) return static_cast<double>(fs::file_size(path, ec));
  double bytes = 0;
  for (fs::directory_iterator it(path, ec), end; !ec && it != end; it.increment(ec)) {
    std::error_code file_ec;
    if (it->path().extension() == ".safetensors") bytes += static_cast<double>(it->file_size(file_ec));
  }
  return bytes;
}

int quantize_command(const QuantizeOptions& o) {
  const Scheme scheme = parse_scheme("--scheme", o.scheme);
  QuantizeCheckpointOptions options;
  options.max_shard_bytes = parse_size("--max-shard-size", o.max_shard_size);
  options.threads = o.threads;
  options.overwrite = o.overwrite;
  options.calibration = o.calibration;
  const bool fixed = scheme.activation_scale == ActivationScale::static_;
  if (fixed == o.calibration.empty()) {
    throw UsageError(fixed ? fmt::format("--calibration: {} needs a file of captured hidden states", o.scheme)
                           : fmt::format("--calibration: {} has no static activation scales", o.scheme));
  }

  double us = 0;
  {
    Progress progress("quantising");
    options.progress = [&](const QuantizeProgress& p) {
      progress.update(p.total > 0 ? static_cast<double>(p.done) / static_cast<double>(p.total) : 0.0, p.current);
    };
    us = time_us([&] { quantize_checkpoint(o.in, o.out, scheme, options); });
  }
  const double before = tensor_bytes(o.in), after = tensor_bytes(o.out);
  const bool colour = wants_colour();
  fmt::print("{} {} in {}: {} -> {}", styled("wrote", Style::good, colour), o.out, to_string(scheme),
             format_bytes(before), format_bytes(after));
  if (before > 0 && after > 0) fmt::print(" ({:.1f} % of the size)", 100.0 * after / before);
  fmt::print(", {:.1f} s, {}/s read\n", us / 1e6, format_bytes(before / (us / 1e6)));
  return kOk;
}

}  // namespace

void add_quantize(CLI::App& app, Action& action) {
  CLI::App* sub = app.add_subcommand("quantize", "Write a checkpoint with quantised experts");
  auto o = std::make_shared<QuantizeOptions>();
  sub->add_option("IN", o->in, "Checkpoint to read: a Hugging Face folder in bf16, fp16 or float32")->required();
  sub->add_option("OUT", o->out, "Folder to write")->required();
  sub->add_option("--scheme", o->scheme,
                  "int8_channel, int8_block, int8_hybrid, w4a8_fp8, bf16 or fp16, with options as in "
                  "int8_hybrid:block=64,q_max=32 (docs/schemes.md)")
      ->required();
  sub->add_option("--calibration", o->calibration,
                  "For static activation scales: safetensors file with layers.L.hidden_states [T, H] and, if at hand, "
                  "layers.L.topk_ids [T, k] or layers.L.router_logits [T, E]");
  sub->add_flag("--overwrite", o->overwrite, "Replace OUT if it exists");
  sub->add_option("--threads", o->threads, "Threads; 0: OCTOMOE_NUM_THREADS, else all cores")
      ->check(CLI::Range(0, 4096));
  sub->add_option("--max-shard-size", o->max_shard_size, "Largest file, such as 5GB or 512MiB")->capture_default_str();
  sub->footer(
      "The format follows the scheme: int8_channel writes compressed-tensors, int8_block writes blockwise_int8, "
      "w4a8_fp8\n"
      "writes w4afp8; int8_hybrid is OctoMoE's own (docs/checkpoints.md). Everything but the experts stays as it "
      "is.\n\n"
      "Examples:\n"
      "  octomoe quantize Qwen3-30B-A3B Qwen3-30B-A3B-INT8 --scheme int8_channel\n"
      "  octomoe quantize data/tiny-qwen3-moe out/static --scheme w4a8_fp8:static --calibration "
      "data/tiny-qwen3-moe/activations.safetensors");
  sub->callback([o, &action] { action = [o] { return quantize_command(*o); }; });
}

}  // namespace octomoe::cli
