#include "jit/target.h"

#include <gmock/gmock.h>

#include "jit/support.h"
#include "support/errors.h"

namespace octomoe::jit {
namespace {

using octomoe::testing::expect_error;
using ::testing::ElementsAre;
using testing::small_entry;

TEST(Target, NamesGoBothWays) {
  for (const char* name : {"sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120", "compute_90"}) {
    EXPECT_EQ(to_string(parse_target(name)), name);
  }
  EXPECT_EQ(parse_target("sm_90"), Target(90));
  for (const char* name : {"", "sm_", "sm_8x", "80", "sm_80a", "compute_90a", "sm_1000000000000", "SM_80"}) {
    expect_error("arch: expected", [&] { parse_target(name); });
  }
  expect_error("arch: expected sm_80 or newer, got sm_75", [] { parse_target("sm_75"); });
}

TEST(Target, OfADevice) {
  const KernelEntry portable = small_entry();
  EXPECT_THAT(targets_for(portable, 80), ElementsAre(Target(80)));
  EXPECT_THAT(targets_for(portable, 86), ElementsAre(Target(86), Target(80)));
  EXPECT_THAT(targets_for(portable, 87), ElementsAre(Target(86), Target(80)));
  EXPECT_THAT(targets_for(portable, 89), ElementsAre(Target(89), Target(86), Target(80)));
  EXPECT_THAT(targets_for(portable, 90), ElementsAre(Target(90)));
  EXPECT_THAT(targets_for(portable, 100), ElementsAre(Target(100), Target(90, true)));
  EXPECT_THAT(targets_for(portable, 121), ElementsAre(Target(121), Target(90, true)));
}

TEST(Target, HopperOnlyKernelsRunOnHopperOnly) {
  KernelEntry hopper = small_entry();
  hopper.archs = {90};
  EXPECT_THAT(targets_for(hopper, 90), ElementsAre(Target(90)));
  for (const int cc : {80, 89, 100}) {
    expect_error(ErrorCode::unsupported, "made for sm_90a, cannot run on compute capability",
                 [&] { targets_for(hopper, cc); });
  }
  KernelEntry ada = small_entry();
  ada.archs = {89};
  expect_error(ErrorCode::unsupported, "made for sm_89, cannot run on compute capability 8.6",
               [&] { targets_for(ada, 86); });
  EXPECT_THAT(targets_for(ada, 90), ElementsAre(Target(90), Target(90, true)));
}

TEST(Target, OldDevicesAreToldSo) {
  expect_error(ErrorCode::unsupported, "expected compute capability 8.0 (Ampere) or newer, got 7.5",
               [] { targets_for(small_entry(), 75); });
}

}  // namespace
}  // namespace octomoe::jit
