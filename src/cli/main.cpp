// octomoe: the command line of the library. One file per subcommand (doctor.cpp, run.cpp, quantize.cpp, bench.cpp,
// tune.cpp, pack.cpp).
//   octomoe --help
#include <unistd.h>

#include <cstdio>
#include <exception>
#include <new>
#include <string>

#include "cli/cli.h"
#include "jit/catalogue.h"
#include "octomoe/error.h"
#include "octomoe/version.h"

namespace octomoe::cli {
namespace {

constexpr const char* kFooter =
    "Examples:\n"
    "  octomoe doctor                                             what this machine offers\n"
    "  octomoe run --checkpoint data/tiny-qwen3-moe --scheme all  error and speed of every scheme\n"
    "  octomoe quantize model model-int8 --scheme int8_channel    write a quantised checkpoint\n"
    "  octomoe bench --model qwen3-30b --tokens 1,128             time one layer with random weights\n"
    "  octomoe tune --model qwen3-30b                             find the fastest kernels on this GPU\n"
    "\n"
    "Exit codes: 0 ok, 1 failure, 2 bad argument. NO_COLOR=1 switches colours off.\n"
    "'octomoe COMMAND --help' explains the options of a command.";

// One line, whatever the exception carried.
int end_with(std::string message, int code) {
  while (!message.empty() && (message.back() == '\n' || message.back() == ' ')) message.pop_back();
  for (char& c : message) {
    if (c == '\n' || c == '\r') c = ' ';
  }
  std::fflush(stdout);
  std::fprintf(stderr, "octomoe: error: %s\n", message.c_str());
  return code;
}

int parse_and_run(int argc, char** argv) {
  CLI::App app("OctoMoE " OCTOMOE_VERSION ": 8-bit Mixture-of-Experts layers", "octomoe");
  app.set_version_flag("--version", "octomoe " OCTOMOE_VERSION, "Print the version and exit");
  app.set_help_flag("-h,--help", "Print this help and exit");
  app.require_subcommand(0, 1);
  app.footer(kFooter);

  Action action;
  add_doctor(app, action);
  add_run(app, action);
  add_quantize(app, action);
  add_bench(app, action);
  add_tune(app, action);
  if (!catalogue().empty()) add_pack(app, action);  // nothing to pack before there are kernels
  try {
    app.parse(argc, argv);
  } catch (const CLI::Success& e) {
    const int code = app.exit(e);  // --help, --version: prints
    return std::fflush(stdout) == 0 ? code : end_with("cannot write to standard output", kFailure);
  } catch (const CLI::ParseError& e) {
    return end_with(std::string(e.what()) + " (see octomoe --help)", kUsage);
  }
  if (!action) return end_with("no command given: doctor, run, quantize, bench or tune (see octomoe --help)", kUsage);
  const int code = action();
  if (std::fflush(stdout) != 0 || std::ferror(stdout)) return end_with("cannot write to standard output", kFailure);
  return code;
}

}  // namespace
}  // namespace octomoe::cli

int main(int argc, char** argv) {
  using namespace octomoe::cli;
  try {
    return parse_and_run(argc, argv);
  } catch (const UsageError& e) {
    return end_with(e.what(), kUsage);
  } catch (const CLI::ParseError& e) {
    return end_with(e.what(), kUsage);
  } catch (const std::bad_alloc&) {
    return end_with("out of memory", kFailure);
  } catch (const std::exception& e) {
    return end_with(e.what(), kFailure);
  }
}
