// The built command as its users meet it: exit codes, messages, files, pipes and terminals.
//   OCTOMOE_CLI=build/octomoe build/octomoe_tests_cli --gtest_filter='Command.*'
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "cli/process.h"
#include "cuda/driver.h"

namespace octomoe::cli::testing {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;
using Json = nlohmann::json;

const std::string kEscape = "\x1b[";
const std::string kTiny = OCTOMOE_SOURCE_DIR "/data/tiny-qwen3-moe";

class Command : public ::testing::Test {
 protected:
  void SetUp() override {
    if (cli_path().empty()) GTEST_SKIP() << "octomoe is not built beside this test and OCTOMOE_CLI is not set";
  }
};

// One line "octomoe: error: ..." on stderr.
void expect_error(const Result& r, int code, const std::string& part) {
  EXPECT_EQ(r.code, code) << r.err;
  EXPECT_THAT(r.err, StartsWith("octomoe: error: "));
  EXPECT_THAT(r.err, HasSubstr(part));
  EXPECT_EQ(std::count(r.err.begin(), r.err.end(), '\n'), 1) << r.err;
  EXPECT_EQ(r.err.back(), '\n');
}

std::vector<std::string> small_bench(std::vector<std::string> more) {
  std::vector<std::string> args = {"bench", "--experts", "8", "--hidden", "64", "--intermediate",
                                   "32",    "--top-k",   "2", "--iters",  "3"};
  args.insert(args.end(), more.begin(), more.end());
  return args;
}

TEST_F(Command, VersionAndHelp) {
  const Result version = run_cli({"--version"});
  EXPECT_EQ(version.code, 0);
  EXPECT_THAT(version.out, StartsWith("octomoe 0."));
  const Result help = run_cli({"--help"});
  EXPECT_EQ(help.code, 0);
  for (const char* part : {"doctor", "run", "quantize", "bench", "tune", "Examples:", "Exit codes"})
    EXPECT_THAT(help.out, HasSubstr(part));
  for (const char* command : {"doctor", "run", "quantize", "bench", "tune"}) {
    const Result r = run_cli({command, "--help"});
    EXPECT_EQ(r.code, 0) << command;
    EXPECT_THAT(r.out, HasSubstr("Example")) << command;
  }
}

TEST_F(Command, UsageErrorsAreTwo) {
  expect_error(run_cli({}), 2, "no command given");
  expect_error(run_cli({"frobnicate"}), 2, "frobnicate");
  expect_error(run_cli({"doctor", "--jsom"}), 2, "--jsom");
  expect_error(run_cli({"run"}), 2, "--checkpoint");
  expect_error(run_cli({"run", "--checkpoint", kTiny, "--scheme", "int7"}), 2, "int7");
  expect_error(run_cli({"run", "--checkpoint", kTiny, "--layers", "99"}), 2, "layer 99 has no experts");
  expect_error(run_cli({"run", "--checkpoint", kTiny, "--threads", "-1"}), 2, "--threads");
  expect_error(run_cli({"run", "--checkpoint", kTiny, "--scheme", "int8_channel:static", "--tokens", "1"}), 2,
               "at least 2");
  expect_error(run_cli({"run", "--checkpoint", kTiny, "--random", "--activations", "x"}), 2, "--random");
  expect_error(run_cli({"quantize", kTiny}), 2, "OUT");
  expect_error(run_cli({"quantize", kTiny, "/tmp/x", "--scheme", "int8_channel", "--max-shard-size", "big"}), 2,
               "'big'");
  expect_error(run_cli({"bench", "--model", "gpt-1"}), 2, "qwen3-30b");
  expect_error(run_cli({"bench", "--tokens", "1,0"}), 2, "--tokens: expected 1 to");
  expect_error(run_cli({"bench", "--experts", "8"}), 2, "--hidden");
  expect_error(run_cli({"bench", "--routing", "zipf:x"}), 2, "zipf");
  expect_error(run_cli({"bench", "--device", "tpu"}), 2, "tpu");
  expect_error(run_cli({"bench", "--peer", "jax"}), 2, "jax");
  expect_error(run_cli({"bench", "--schemes", "bf16", "--q-max", "8"}), 2, "--q-max: expected int8_hybrid");
  expect_error(run_cli({"bench", "--quant-block-size", "16"}), 2, "--quant-block-size");
  expect_error(run_cli({"bench", "--super-group-size", "0"}), 2, "--super-group-size");
  for (const char* flag : {"--graph", "--profile", "--no-fused-gather", "--no-fused-activation", "--no-replay"})
    expect_error(run_cli({"bench", flag}), 2, "for --device cuda");
  expect_error(run_cli({"bench", "--family", "sm80"}), 2, "for --device cuda");
  expect_error(run_cli({"bench", "--combine-order", "any"}), 2, "for --device cuda");
  expect_error(run_cli({"bench", "--device", "cuda", "--combine-order", "fast"}), 2, "--combine-order");
  expect_error(run_cli({"bench", "--device", "cuda", "--family", "sm75"}), 2, "--family");
  expect_error(run_cli({"bench", "--study", "grouping"}), 2, "for --device cuda");
  expect_error(run_cli({"bench", "--device", "cuda", "--study", "tiles"}), 2, "--study");
  expect_error(run_cli({"bench", "--device", "cuda", "--profile", "--tokens", "1,2"}), 2, "got 1 and 2");
  expect_error(run_cli({"bench", "--device", "cuda", "--profile", "--tokens", "1", "--schemes", "all"}), 2,
               "got 3 and 1");
  expect_error(run_cli({"bench", "--device", "cuda", "--study", "grouping", "--graph"}), 2, "--study: ");
  expect_error(run_cli({"bench", "--device", "cuda", "--study", "grouping", "--schemes", "fp16"}), 2, "got fp16");
  expect_error(run_cli({"run", "--checkpoint", kTiny, "--device", "gpu"}), 2, "--device: ");
  expect_error(run_cli({"run", "--checkpoint", kTiny, "--device", "cuda", "--scheme", "int8_channel,bf16"}), 2,
               "with --device cuda, got bf16");
  expect_error(run_cli(small_bench({"--min-time", "1"})), 2, "--min-time");
  expect_error(run_cli(small_bench({"--experts-local", "9"})), 2, "--experts-local");
}

TEST_F(Command, TuneUsageErrorsAreTwo) {
  expect_error(run_cli({"tune"}), 2, "--all-models");
  expect_error(run_cli({"tune", "--model", "gpt-1"}), 2, "qwen3-30b");
  expect_error(run_cli({"tune", "--experts", "8"}), 2, "--hidden");
  expect_error(run_cli({"tune", "--all-models", "--model", "qwen3-30b"}), 2, "--all-models");
  expect_error(run_cli({"tune", "--all-models", "--experts-local", "4"}), 2, "--all-models");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--device", "cpu"}), 2, "--device: expected cuda");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--device", "tpu"}), 2, "--device: ");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--tokens", "0"}), 2, "--tokens: expected 1 to");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--schemes", "bf16"}), 2, "--schemes: expected integer");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--family", "sm75"}), 2, "--family");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--rounds", "0"}), 2, "--rounds");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--experts-local", "129"}), 2, "--experts-local");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--json", "x"}), 2, "--json");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--out", "-"}), 2, "--out: expected a file");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--check", "x"}), 2, "--check");
  const RunOptions homeless{
      .environment = {{"OCTOMOE_TUNED", ""}, {"OCTOMOE_CACHE_DIR", ""}, {"XDG_CACHE_HOME", ""}, {"HOME", ""}}};
  expect_error(run_cli({"tune", "--model", "qwen3-30b"}, homeless), 2, "--out: expected a file");
}

TEST_F(Command, TuneFailuresAreOne) {
  TempFolder folder;
  if (!cuda::driver_available()) {
    expect_error(run_cli({"tune", "--model", "qwen3-30b", "--out", folder / "t.json"}), 1, "CUDA driver");
    EXPECT_EQ(folder.entries(), 0u);
  }
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--out", "/nonexistent/t.json"}), 1, "/nonexistent/t.json");
  // What is there is merged, so it must be a table; it stays.
  write_file(folder / "t.json", "{\"version\": 7, \"entries\": []}");
  expect_error(run_cli({"tune", "--model", "qwen3-30b", "--out", folder / "t.json"}), 1, "version: expected 1, got 7");
  expect_error(run_cli({"tune", "--model", "qwen3-30b"}, {.environment = {{"OCTOMOE_TUNED", folder / "t.json"}}}), 1,
               "t.json: version");
  EXPECT_THAT(read_file(folder / "t.json"), HasSubstr("7"));
  expect_error(run_cli({"tune", "--check", folder / "none.json"}), 1, "none.json");
  write_file(folder / "e.json", "{\"version\": 1, \"entries\": []}");
  expect_error(run_cli({"tune", "--check", folder / "e.json"}), 1, "expected entries");
}

// A table of two models, the second made up of the first.
TEST_F(Command, TuneChecksTheCostModel) {
  TempFolder folder;
  Json table = Json::parse(read_file(OCTOMOE_SOURCE_DIR "/share/tuned.json"));
  const Json all = table["entries"];
  table["entries"] = Json::array();
  for (Json e : all) {
    if (e["experts"] != 128 || !((e["n"] == 1536 && e["k"] == 2048) || (e["n"] == 2048 && e["k"] == 768))) continue;
    table["entries"].push_back(e);
    e["n"] = e["epilogue"] != "store" ? 1024 : 2048;
    e["k"] = e["epilogue"] != "store" ? 2048 : 512;
    e["experts"] = 256;
    table["entries"].push_back(e);
  }
  write_file(folder / "two.json", table.dump());
  const Result r = run_cli({"tune", "--check", folder / "two.json", "--json", folder / "check.json"});
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, AllOf(HasSubstr("qwen3-30b"), HasSubstr("qwen3.6-35b"), HasSubstr("left out: with constants")));
  const Json j = Json::parse(read_file(folder / "check.json"));
  ASSERT_EQ(j["results"].size(), 6u);
  for (const Json& row : j["results"]) {
    EXPECT_GE(row["mean_loss"].get<double>(), 0);
    EXPECT_GE(row["worst_loss"].get<double>(), row["mean_loss"].get<double>());
    EXPECT_GE(row["left_out_worst_loss"].get<double>(), row["left_out_mean_loss"].get<double>());
    EXPECT_GT(row["points"].get<int>(), 0);
  }
}

// What `octomoe tune --family sm80` measures has none of the other family's kernels, but the one that stands in for
// them.
TEST_F(Command, TuneChecksOneFamily) {
  TempFolder folder;
  Json table = Json::parse(read_file(OCTOMOE_SOURCE_DIR "/share/tuned.json"));
  Json part = table;
  part["entries"] = Json::array();
  for (Json e : table["entries"]) {
    Json us = Json::object();
    for (const auto& [kernel, time] : e["us"].items()) {
      if (kernel.starts_with("sm80")) us[kernel] = time;
    }
    if (us.empty()) continue;
    e["us"] = us;
    e["kernel"] = us.begin().key();
    part["entries"].push_back(e);
  }
  write_file(folder / "part.json", part.dump());
  const Result r = run_cli({"tune", "--check", folder / "part.json"});
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, AllOf(HasSubstr("sm80"), Not(HasSubstr("sm90"))));
}

// Whose choice is not the fastest kernel, and by how much.
TEST_F(Command, TuneCheckSeesALoss) {
  TempFolder folder;
  Json table = Json::parse(read_file(OCTOMOE_SOURCE_DIR "/share/tuned.json"));
  Json one = table;
  one["entries"] = Json::array();
  for (const Json& e : table["entries"]) {
    // Of rows that fill a GPU: no other kernel stands in for wgmma's.
    if (one["entries"].empty() && e["promotion"] == "channel" && e["rows"] > 4096) one["entries"].push_back(e);
  }
  Json& us = one["entries"][0]["us"];
  const auto check = [&] {
    write_file(folder / "one.json", one.dump());
    const Result r = run_cli({"tune", "--check", folder / "one.json", "--json", "-"});
    EXPECT_EQ(r.code, 0) << r.err;
    return Json::parse(r.out.substr(r.out.find("\n{")));
  };
  for (auto& [kernel, value] : us.items()) value = 10;
  Json j = check();
  EXPECT_EQ(j["results"][0]["worst_loss"], 0);
  EXPECT_TRUE(j["results"][0]["left_out_worst_loss"].is_null());  // one model only
  for (auto& [kernel, value] : us.items()) {
    if (kernel.starts_with("sm80")) value = 8;  // which the cost model does not look at beside wgmma
  }
  j = check();
  EXPECT_EQ(j["results"][0]["family"], "sm90");
  EXPECT_EQ(j["results"][0]["worst_loss"], 0.25);
  EXPECT_EQ(j["results"][2]["family"], "sm80");
  EXPECT_EQ(j["results"][2]["worst_loss"], 0);
}

TEST_F(Command, DoctorNamesTheTunedTables) {
  TempFolder folder;
  write_file(folder / "mine.json", "{\"version\": 1, \"entries\": []}");
  const RunOptions mine{.environment = {{"OCTOMOE_TUNED", folder / "mine.json"}}};
  EXPECT_THAT(run_cli({"doctor"}, mine).out, HasSubstr("tuned table: " + folder / "mine.json" + " (0 entries"));
  Json j = Json::parse(run_cli({"doctor", "--json"}, mine).out);
  EXPECT_EQ(j["engines"]["cuda"]["tuned_tables"].back()["path"], folder / "mine.json");
  write_file(folder / "mine.json", "no table");
  EXPECT_THAT(run_cli({"doctor"}, mine).out, HasSubstr("tuned table: not used: " + folder / "mine.json"));
  j = Json::parse(run_cli({"doctor", "--json"}, mine).out);
  EXPECT_TRUE(j["engines"]["cuda"]["tuned_tables"].back().contains("problem"));
}

TEST_F(Command, FailuresAreOne) {
  expect_error(run_cli({"run", "--checkpoint", "/nonexistent/model"}), 1, "/nonexistent/model");
  expect_error(run_cli({"quantize", "/nonexistent/model", "/tmp/x", "--scheme", "bf16"}), 1, "/nonexistent/model");
  if (!cuda::driver_available()) {
    expect_error(run_cli({"bench", "--device", "cuda"}), 1, "CUDA driver");
    expect_error(run_cli({"bench", "--device", "cuda", "--profile"}), 1, "CUDA driver");
    expect_error(run_cli({"bench", "--device", "cuda", "--study", "grouping"}), 1, "CUDA driver");
    expect_error(run_cli({"run", "--checkpoint", kTiny, "--device", "cuda"}), 1, "CUDA driver");
  }
  expect_error(run_cli({"bench", "--device", "cuda", "--peer", "torch"}), 2, "--peer torch");
  // A hundred terabytes: more than any machine this runs on.
  expect_error(run_cli({"bench", "--experts", "65536", "--hidden", "8192", "--intermediate", "16384", "--top-k", "8"}),
               1, "--experts-local");
  expect_error(run_cli(small_bench({"--routing", "from-file:/nonexistent/routes"})), 1, "/nonexistent/routes");
}

TEST_F(Command, MissingActivationsSayHowToGiveThem) {
  TempFolder folder;
  for (const char* name : {"config.json", "model.safetensors"}) fs::create_symlink(kTiny + "/" + name, folder / name);
  expect_error(run_cli({"run", "--checkpoint", folder / ""}), 1, "--activations FILE");
  const Result random =
      run_cli({"run", "--checkpoint", folder / "", "--random", "--tokens", "8", "--layers", "0", "--iters", "1"});
  EXPECT_EQ(random.code, 0) << random.err;
  EXPECT_THAT(random.out, HasSubstr("standard normal"));
}

TEST_F(Command, DoctorSpeaksPlainly) {
  const Result r = run_cli({"doctor"});
  EXPECT_EQ(r.code, 0) << r.err;
  for (const char* part : {"CPU engine:", "CUDA engine:", "kernel pack", "NVRTC", "NCCL", "cuBLAS", "CUDA driver"}) {
    EXPECT_THAT(r.out, HasSubstr(part));
  }
  EXPECT_THAT(r.out, Not(HasSubstr(kEscape)));
  const Json j = Json::parse(run_cli({"doctor", "--json"}).out);
  EXPECT_FALSE(j["engines"]["cuda"]["available"].get<bool>());
  EXPECT_GE(j["machine"]["cores"].get<int>(), 1);
  ASSERT_EQ(j["cuda"]["libraries"].size(), 5u);
  for (const Json& l : j["cuda"]["libraries"]) {
    EXPECT_FALSE(l["tried"].empty());
    EXPECT_NE(l["found"].get<bool>(), l.contains("fix")) << l;
  }
}

TEST_F(Command, DoctorSearchesCudaHome) {
  TempFolder folder;
  fs::create_directories(folder / "lib64");
  write_file(folder / "lib64/libnccl.so.2", "not a library");
  const Json j = Json::parse(run_cli({"doctor", "--json"}, {.environment = {{"CUDA_HOME", folder / ""}}}).out);
  const Json& nccl = j["cuda"]["libraries"][3];
  if (!nccl["found"].get<bool>()) {
    EXPECT_THAT(nccl["problem"].get<std::string>(), HasSubstr("libnccl.so.2"));
    EXPECT_EQ(nccl["tried"].size(), 2u);
  }
}

TEST_F(Command, RunShowsEveryScheme) {
  TempFolder folder;
  const Result r =
      run_cli({"run", "--checkpoint", kTiny, "--tokens", "24", "--iters", "2", "--json", folder / "run.json"});
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(r.err, "");  // no progress in a pipe
  EXPECT_THAT(r.out, AllOf(Not(HasSubstr(kEscape)), Not(HasSubstr("\r")), HasSubstr("bit-equal")));
  const Json j = Json::parse(read_file(folder / "run.json"));
  EXPECT_EQ(j["tokens"], 24);
  EXPECT_EQ(j["checkpoint"], "tiny-qwen3-moe");
  ASSERT_EQ(j["results"].size(), 6u);
  for (const Json& s : j["results"]) {
    const std::string name = s["scheme"];
    EXPECT_TRUE(s["bit_equal"].get<bool>() || !name.starts_with("int8")) << name;
    EXPECT_GT(s["error_vs_float32_worst"].get<double>(), 0) << name;
    EXPECT_LT(s["error_vs_float32_worst"].get<double>(), name == "w4a8_fp8" ? 0.3 : 0.1) << name;
    EXPECT_LE(s["error_vs_float32_mean"].get<double>(), s["error_vs_float32_worst"].get<double>()) << name;
    EXPECT_LT(s["error_vs_quantised_worst"].get<double>(), 0.01) << name;
    EXPECT_GT(s["us_per_token"].get<double>(), 0) << name;
    EXPECT_GT(s["speedup_over_bf16"].get<double>(), 0) << name;
    EXPECT_GT(s["weight_bytes"].get<double>(), 0) << name;
  }
  EXPECT_EQ(folder.entries(), 1u);  // no temporary file stays
}

TEST_F(Command, ProgressAndColourInATerminalOnly) {
  const std::vector<std::string> args = {"run", "--checkpoint", kTiny, "--tokens", "8", "--layers",
                                         "0",   "--iters",      "1"};
  const Result colour = run_cli(args, {.terminal = true});
  EXPECT_EQ(colour.code, 0) << colour.out;
  EXPECT_THAT(colour.out, AllOf(HasSubstr("\r\x1b[Krunning ["), HasSubstr("\x1b[32mbit-equal\x1b[0m")));
  const Result plain = run_cli(args, {.environment = {{"NO_COLOR", "1"}}, .terminal = true});
  EXPECT_THAT(plain.out, AllOf(HasSubstr("running ["), HasSubstr("bit-equal"), Not(HasSubstr("\x1b[32m")),
                               Not(HasSubstr("\x1b[1m"))));
  const Result dumb = run_cli(args, {.environment = {{"TERM", "dumb"}}, .terminal = true});
  EXPECT_THAT(dumb.out, AllOf(Not(HasSubstr("running [")), Not(HasSubstr(kEscape))));
}

TEST_F(Command, UnwritableOutputIsReportedBeforeTheWork) {
  for (const std::string path : {"/nonexistent/run.json", "/dev/null/run.json", "/tmp"}) {
    const Result r = run_cli({"run", "--checkpoint", kTiny, "--json", path});
    expect_error(r, 1, path);
    EXPECT_EQ(r.out, "");
  }
}

TEST_F(Command, FullDiskKeepsTheOldFile) {
  TempFolder folder;
  const std::string path = folder / "run.json";
  write_file(path, "old");
  const std::vector<std::string> args = {"run", "--checkpoint", kTiny, "--tokens", "4", "--layers",
                                         "0",   "--iters",      "1",   "--json",   path};
  expect_error(run_cli(args, {.file_size_limit = 500}), 1, "run.json: cannot write");
  EXPECT_EQ(read_file(path), "old");
  EXPECT_EQ(folder.entries(), 1u);
  EXPECT_EQ(run_cli(args).code, 0);
  EXPECT_TRUE(Json::accept(read_file(path)));
  expect_error(run_cli({"doctor"}, {.out_file = "/dev/full"}), 1, "standard output");
}

TEST_F(Command, QuantizeThenRun) {
  TempFolder folder;
  const std::vector<std::string> args = {"quantize", kTiny, folder / "int8", "--scheme", "int8_block"};
  const Result first = run_cli(args);
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_EQ(first.err, "");
  EXPECT_THAT(first.out, AllOf(StartsWith("wrote "), HasSubstr("% of the size")));
  expect_error(run_cli(args), 1, "overwrite");
  std::vector<std::string> again = args;
  again.push_back("--overwrite");
  const Result second = run_cli(again, {.terminal = true});
  EXPECT_EQ(second.code, 0) << second.out;
  EXPECT_THAT(second.out, HasSubstr("quantising ["));

  const std::vector<std::string> run = {"run",
                                        "--checkpoint",
                                        folder / "int8",
                                        "--activations",
                                        kTiny + "/activations.safetensors",
                                        "--tokens",
                                        "8",
                                        "--iters",
                                        "1"};
  const Result own = run_cli(run);
  EXPECT_EQ(own.code, 0) << own.err;
  EXPECT_THAT(own.out, AllOf(HasSubstr("int8_block"), HasSubstr("bit-equal"), HasSubstr("dequantised"),
                             Not(HasSubstr("int8_hybrid"))));
  std::vector<std::string> other = run;
  other.insert(other.end(), {"--scheme", "int8_channel"});
  expect_error(run_cli(other), 2, "already quantised");
}

TEST_F(Command, StaticScalesAreCalibrated) {
  TempFolder folder;
  const Result r = run_cli({"run", "--checkpoint", kTiny, "--scheme", "int8_channel:static,w4a8_fp8:static", "--layers",
                            "0", "--tokens", "9", "--iters", "1", "--json", folder / "r.json"});
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, AllOf(HasSubstr("5 tokens a layer"), HasSubstr("calibrated on the 4 tokens before")));
  const Json j = Json::parse(read_file(folder / "r.json"));
  EXPECT_EQ(j["tokens"], 5);
  EXPECT_EQ(j["calibration_tokens"], 4);

  const std::string states = kTiny + "/activations.safetensors";
  std::vector<std::string> args = {"quantize", kTiny, folder / "static", "--scheme", "w4a8_fp8:static"};
  expect_error(run_cli(args), 2, "--calibration: w4a8_fp8:static needs a file");
  args.insert(args.end(), {"--calibration", states});
  const Result quantize = run_cli(args);
  EXPECT_EQ(quantize.code, 0) << quantize.err;
  const Result own =
      run_cli({"run", "--checkpoint", folder / "static", "--activations", states, "--tokens", "8", "--iters", "1"});
  EXPECT_EQ(own.code, 0) << own.err;
  EXPECT_THAT(own.out, AllOf(HasSubstr("w4a8_fp8:static"), HasSubstr("8 tokens"), Not(HasSubstr("calibrated"))));
  args[4] = "int8_block";
  expect_error(run_cli(args), 2, "--calibration: int8_block has no static");
}

TEST_F(Command, BenchWritesEveryNumber) {
  TempFolder folder;
  const Result r =
      run_cli(small_bench({"--tokens", "1,16", "--schemes", "int8_channel,int8_hybrid:q_max=8,super=4,bf16",
                           "--routing", "zipf:1.2", "--experts-local", "4", "--json", folder / "b.json"}));
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(r.err, "");
  EXPECT_THAT(r.out, AllOf(HasSubstr("T = 1 "), HasSubstr("T = 16"), HasSubstr("of floor"), Not(HasSubstr(kEscape))));
  const Json j = Json::parse(read_file(folder / "b.json"));
  for (const char* key : {"version", "date", "commit", "machine", "ceilings", "problem", "results"})
    EXPECT_TRUE(j.contains(key)) << key;
  EXPECT_EQ(j["problem"]["experts_local"], 4);
  EXPECT_GT(j["ceilings"]["read_bytes_per_s"].get<double>(), 1e8);
  ASSERT_EQ(j["results"].size(), 6u);
  for (const Json& row : j["results"]) {
    EXPECT_GT(row["median_us"].get<double>(), 0);
    EXPECT_LE(row["p10_us"].get<double>(), row["median_us"].get<double>());
    EXPECT_GE(row["p90_us"].get<double>(), row["median_us"].get<double>());
    EXPECT_GT(row["floor_us"].get<double>(), 0);
    EXPECT_EQ(row["rounds"], 3);
    EXPECT_LE(row["touched_experts"].get<int>(), 4);
    EXPECT_LE(row["routes"].get<int>(), row["tokens"].get<int>() * 2);
    EXPECT_TRUE(row["speedup_over_peer"].is_null());
    EXPECT_GT(row["speedup_over_bf16"].get<double>(), 0);
    EXPECT_FALSE(row["workspace_bytes"].is_null());
  }
}

TEST_F(Command, BenchTakesTheHybridsParameters) {
  TempFolder folder;
  const Result r = run_cli(small_bench({"--tokens", "4", "--schemes", "int8_hybrid,int8_block", "--quant-block-size",
                                        "32", "--super-group-size", "2", "--q-max", "8", "--json", folder / "b.json"}));
  ASSERT_EQ(r.code, 0) << r.err;
  const Json j = Json::parse(read_file(folder / "b.json"));
  EXPECT_EQ(j["results"][0]["name"], "int8_hybrid:block_k=32,super=2,q_max=8");
  EXPECT_EQ(j["results"][1]["name"], "int8_block");
}

// Where there is a GPU: scripts/gpu.sh check.
class GpuCommand : public Command {
 protected:
  void SetUp() override {
    if (!cuda::driver_available()) GTEST_SKIP() << "no GPU here";
    Command::SetUp();
  }
};

TEST_F(GpuCommand, BenchWritesEveryNumber) {
  TempFolder folder;
  const Result r = run_cli(
      small_bench({"--device", "cuda", "--graph", "--tokens", "1,64", "--q-max", "32", "--json", folder / "b.json"}));
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, AllOf(HasSubstr("CUDA graph"), HasSubstr("a plain read of"), HasSubstr("SM clock")));
  const Json j = Json::parse(read_file(folder / "b.json"));
  EXPECT_FALSE(j["gpu"].is_null());
  ASSERT_EQ(j["results"].size(), 6u);
  EXPECT_EQ(j["results"][2]["name"], "int8_hybrid:q_max=32");
  for (const Json& row : j["results"]) {
    EXPECT_GT(row["median_us"].get<double>(), 0);
    EXPECT_GT(row["eager"]["median_us"].get<double>(), 0);
    EXPECT_GT(row["host_us"].get<double>(), 0);
    EXPECT_GT(row["host_new_us"].get<double>(), 0);
    EXPECT_GT(row["read_bytes_per_s"].get<double>(), 1e8);
    EXPECT_GT(row["clock_mhz"].get<double>(), 100);
    EXPECT_LE(row["clock_low_mhz"].get<double>(), row["clock_high_mhz"].get<double>());
    EXPECT_EQ(row["weight_copies"], 16);  // 50 KB of weights never fill L2
    const double workspace = row["workspace_bytes"].get<double>(), live = row["workspace_live_bytes"].get<double>();
    EXPECT_LE(live, workspace);
    EXPECT_LE(workspace, 1.2 * live);
  }
}

TEST_F(GpuCommand, ProfileShowsEveryStage) {
  TempFolder folder;
  const Result r = run_cli(small_bench({"--device", "cuda", "--profile", "--no-fused-activation", "--no-fused-gather",
                                        "--tokens", "16", "--json", folder / "b.json"}));
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_THAT(r.out, HasSubstr("profiled: one call between cuProfilerStart and cuProfilerStop"));
  const Json j = Json::parse(read_file(folder / "b.json"));
  std::vector<std::string> names;
  for (const Json& s : j["results"][0]["stages"]) {
    names.push_back(s["name"]);
    EXPECT_GT(s["median_us"].get<double>(), 0) << names.back();
  }
  EXPECT_THAT(names, ElementsAre("route", "sort", "quantise x", "gather", "gemm1", "activate", "quantise h", "gemm2",
                                 "combine"));
}

TEST_F(GpuCommand, CombineOrder) {
  TempFolder folder;
  const Result r = run_cli(small_bench(
      {"--device", "cuda", "--graph", "--combine-order", "any", "--tokens", "2,900", "--json", folder / "b.json"}));
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_EQ(Json::parse(read_file(folder / "b.json"))["combine_order"], "any");
}

TEST_F(GpuCommand, StudyComparesTheWays) {
  TempFolder folder;
  const Result r = run_cli({"bench", "--device", "cuda", "--study", "grouping", "--experts", "16", "--hidden", "256",
                            "--intermediate", "128", "--tokens", "2,32", "--iters", "2", "--json", folder / "s.json"});
  ASSERT_EQ(r.code, 0) << r.err;
  const Json j = Json::parse(read_file(folder / "s.json"));
  EXPECT_EQ(j["study"], "grouping");
  ASSERT_EQ(j["cases"].size(), 8u);
  for (const Json& c : j["cases"]) {
    ASSERT_EQ(c["ways"].size(), 5u);
    EXPECT_EQ(c["ways"][0]["launches"], 1);
    EXPECT_EQ(c["ways"][2]["launches"], c["busy_experts"]);
    for (const Json& w : c["ways"]) EXPECT_GT(w["graph"]["median_us"].get<double>(), 0);
  }
}

TEST_F(GpuCommand, Tune) {
  TempFolder folder;
  const std::string path = folder / "t.json";
  const auto tune = [&](const std::string& tokens) {
    return run_cli({"tune", "--experts", "16", "--hidden", "256", "--intermediate", "128", "--top-k", "2", "--tokens",
                    tokens, "--rounds", "2", "--out", path});
  };
  const Result first = tune("1,64");
  ASSERT_EQ(first.code, 0) << first.err;
  EXPECT_THAT(first.out, AllOf(HasSubstr("w13"), HasSubstr("cost model"), HasSubstr("12 entries measured, 12 in all")));
  Json j = Json::parse(read_file(path));
  ASSERT_EQ(j["entries"].size(), 12u);
  for (const Json& e : j["entries"]) {
    EXPECT_EQ(e["experts"], 16);
    EXPECT_TRUE(e["rows"] == 2 || e["rows"] == 128) << e;
    const double least = e["us"][e["kernel"].get<std::string>()];
    EXPECT_GT(least, 0.1);
    EXPECT_GE(e["us"].size(), e["epilogue"] == "swiglu_block" ? 1u : 2u);      // one kernel quantises h
    for (const Json& us : e["us"]) EXPECT_GE(1.02 * us.get<double>(), least);  // less is noise
  }
  const Result second = tune("64,1024");
  ASSERT_EQ(second.code, 0) << second.err;
  EXPECT_THAT(second.out, HasSubstr("12 entries measured, 18 in all (12 before)"));
  const RunOptions mine{.environment = {{"OCTOMOE_TUNED", path}}};
  j = Json::parse(run_cli({"doctor", "--json"}, mine).out);
  EXPECT_EQ(j["engines"]["cuda"]["tuned_tables"].back()["entries_for_gpus"], 18);
  // Layers run with what it says.
  const Result bench = run_cli({"bench", "--device", "cuda", "--experts", "16", "--hidden", "256", "--intermediate",
                                "128", "--top-k", "2", "--tokens", "64", "--iters", "2"},
                               mine);
  EXPECT_EQ(bench.code, 0) << bench.err;
  EXPECT_EQ(run_cli({"tune", "--check", path}).code, 0);
}

// One rank of two: the table is asked for the rows that it probably has.
TEST_F(GpuCommand, TuneOfARank) {
  TempFolder folder;
  const Result r = run_cli({"tune",
                            "--experts",
                            "16",
                            "--experts-local",
                            "8",
                            "--hidden",
                            "256",
                            "--intermediate",
                            "128",
                            "--top-k",
                            "2",
                            "--tokens",
                            "64",
                            "--schemes",
                            "int8_channel",
                            "--family",
                            "sm80",
                            "--rounds",
                            "1",
                            "--out",
                            folder / "t.json"});
  ASSERT_EQ(r.code, 0) << r.err;
  const Json j = Json::parse(read_file(folder / "t.json"));
  ASSERT_EQ(j["entries"].size(), 2u);
  for (const Json& e : j["entries"]) {
    EXPECT_EQ(e["rows"], 64);
    EXPECT_EQ(e["experts"], 8);
    for (const auto& [kernel, us] : e["us"].items()) EXPECT_THAT(kernel, StartsWith("sm80"));
  }
}

TEST_F(GpuCommand, RunIsBitEqual) {
  TempFolder folder;
  const Result r =
      run_cli({"run", "--checkpoint", kTiny, "--device", "cuda", "--tokens", "48", "--iters", "2", "--scheme",
               "int8_channel,int8_channel:static,int8_block,int8_hybrid:q_max=32", "--json", folder / "run.json"});
  ASSERT_EQ(r.code, 0) << r.err;
  const Json j = Json::parse(read_file(folder / "run.json"));
  EXPECT_EQ(j["device"], "cuda:0");
  ASSERT_EQ(j["results"].size(), 4u);
  for (const Json& s : j["results"]) {
    EXPECT_TRUE(s["bit_equal"].get<bool>()) << s;
    EXPECT_GT(s["us_per_token"].get<double>(), 0);
    EXPECT_TRUE(s["speedup_over_bf16"].is_null());
  }
  expect_error(run_cli({"run", "--checkpoint", kTiny, "--device", "cuda:77"}), 1, "cuda:77");
}

TEST_F(Command, BenchRoutings) {
  TempFolder folder;
  const auto rows = [&](const std::string& routing, const std::string& seed) {
    const Result r = run_cli(small_bench({"--tokens", "64", "--schemes", "int8_channel", "--routing", routing, "--seed",
                                          seed, "--json", folder / "b.json"}));
    EXPECT_EQ(r.code, 0) << r.err;
    return Json::parse(read_file(folder / "b.json"))["results"][0];
  };
  EXPECT_EQ(rows("single", "0")["touched_experts"], 2);
  EXPECT_EQ(rows("uniform", "0")["touched_experts"], 8);
  EXPECT_EQ(rows("uniform", "0")["routes"], 128);
}

// A stand-in for Python: answers peer_torch.py's lines, and "draws" by copying the JSON.
std::string fake_python(const TempFolder& folder, const std::string& on_time,
                        const std::string& on_plot = "cp \"$3\" \"$4\"") {
  const std::string path = folder / "python";
  write_file(path,
             "#!/bin/sh\n"
             "case \"$1\" in -c) exit 0;; -m) " +
                 on_plot +
                 "; exit $?;; esac\n"
                 "while read -r line; do case \"$line\" in\n"
                 "*prepare*) echo '{\"peers\": [\"loop\", \"grouped\"], \"torch\": \"9.9\", \"threads\": 1}';;\n"
                 "*overhead*) echo '{\"call_us\": 3.5}';;\n"
                 "*grouped*) echo '{\"us\": 50}';;\n"
                 "*) " +
                 on_time +
                 ";;\n"
                 "esac; done\n");
  fs::permissions(path, fs::perms::owner_all);
  return path;
}

TEST_F(Command, BenchComparesWithThePeer) {
  TempFolder folder;
  const std::string python = fake_python(folder, "echo '{\"us\": 100.5}'");
  const Result r =
      run_cli(small_bench({"--tokens", "2", "--schemes", "bf16", "--peer", "torch", "--json", folder / "b.json"}),
              {.environment = {{"OCTOMOE_PYTHON", python}}});
  ASSERT_EQ(r.code, 0) << r.err;
  const Json j = Json::parse(read_file(folder / "b.json"));
  EXPECT_EQ(j["peer"]["version"], "9.9");
  EXPECT_EQ(j["python_overhead_us"], 3.5);
  ASSERT_EQ(j["results"].size(), 3u);
  EXPECT_EQ(j["results"][1]["name"], "torch loop");
  EXPECT_EQ(j["results"][1]["kind"], "peer");
  EXPECT_EQ(j["results"][1]["median_us"], 100.5);
  EXPECT_DOUBLE_EQ(j["results"][1]["speedup_over_peer"], 50 / 100.5);  // the fastest peer is the yardstick
  EXPECT_TRUE(j["results"][1]["workspace_bytes"].is_null());
}

TEST_F(Command, BenchSurvivesNoBadPeer) {
  TempFolder folder;
  const auto run = [&](const std::string& on_time) {
    return run_cli(small_bench({"--tokens", "2", "--schemes", "bf16", "--peer", "torch"}),
                   {.environment = {{"OCTOMOE_PYTHON", fake_python(folder, on_time)}}});
  };
  expect_error(run("echo '{\"error\": \"no torch here\"}'"), 1, "no torch here");
  expect_error(run("echo nonsense"), 1, "nonsense");
  expect_error(run("echo 'the last words' >&2; exit 3"), 1, "the last words");
}

TEST_F(Command, BenchPlotsOrKeepsTheOldPicture) {
  TempFolder folder;
  const std::vector<std::string> args = small_bench({"--tokens", "1", "--schemes", "bf16", "--plot", folder / "b.png"});
  const Result r = run_cli(args, {.environment = {{"OCTOMOE_PYTHON", fake_python(folder, "")}}});
  ASSERT_EQ(r.code, 0) << r.err;
  EXPECT_TRUE(Json::accept(read_file(folder / "b.png")));
  write_file(folder / "b.png", "old");
  expect_error(run_cli(args, {.environment = {{"OCTOMOE_PYTHON", fake_python(folder, "", "echo oops >&2; false")}}}), 1,
               "oops");
  EXPECT_EQ(read_file(folder / "b.png"), "old");
  EXPECT_EQ(folder.entries(), 2u);
}

TEST_F(Command, BenchSaysWhatIsMissing) {
  const RunOptions no_python = {.environment = {{"OCTOMOE_PYTHON", "/nonexistent/python"}}};
  expect_error(run_cli(small_bench({"--peer", "torch"}), no_python), 1, "/nonexistent/python");
  expect_error(run_cli(small_bench({"--plot", "/tmp/octomoe-test.png"}), no_python), 1, "/nonexistent/python");
  expect_error(run_cli(small_bench({"--peer", "torch", "--experts-local", "4"})), 2, "--experts-local");
}

}  // namespace
}  // namespace octomoe::cli::testing
