#include "base/log.h"

#include <gtest/gtest.h>

#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace octomoe {
namespace {

TEST(Log, GoesToTheCallbackAndNowhereElse) {
  log(LogLevel::warning, "nobody listens");
  std::vector<std::string> got;
  set_log_callback(
      [&](LogLevel level, const std::string& m) { got.push_back((level == LogLevel::warning ? "W " : "I ") + m); });
  log(LogLevel::warning, "a");
  log(LogLevel::info, "b");
  set_log_callback({});
  log(LogLevel::info, "c");
  EXPECT_EQ(got, (std::vector<std::string>{"W a", "I b"}));
}

TEST(Log, CallbacksMayThrowLogAndReplaceThemselves) {
  int calls = 0;
  set_log_callback([&](LogLevel, const std::string&) {
    ++calls;
    log(LogLevel::info, "again");
    throw std::runtime_error("no");
  });
  EXPECT_NO_THROW(log(LogLevel::info, "x"));
  EXPECT_EQ(calls, 1);
  set_log_callback([&](LogLevel, const std::string&) { set_log_callback({}); });
  log(LogLevel::info, "x");
  log(LogLevel::info, "x");
  EXPECT_EQ(calls, 1);
}

TEST(Log, OneMessageAtATime) {
  int inside = 0, most = 0, total = 0;  // no atomics: the library serialises the calls
  set_log_callback([&](LogLevel, const std::string&) {
    most = std::max(most, ++inside);
    ++total;
    --inside;
  });
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([] {
      for (int k = 0; k < 500; ++k) log(LogLevel::info, "x");
    });
  }
  for (std::thread& t : threads) t.join();
  set_log_callback({});
  EXPECT_EQ(most, 1);
  EXPECT_EQ(total, 2000);
}

}  // namespace
}  // namespace octomoe
