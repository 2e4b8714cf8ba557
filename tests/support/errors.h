#pragma once

#include <gtest/gtest.h>

#include <string>

#include "octomoe/error.h"

namespace octomoe::testing {

// Runs fn and expects an octomoe::Error of that code whose message contains `text`.
template <class Fn>
void expect_error(ErrorCode code, const std::string& text, const Fn& fn) {
  try {
    fn();
    ADD_FAILURE() << "expected an error with \"" << text << "\"";
  } catch (const Error& e) {
    EXPECT_EQ(to_string(e.code()), std::string(to_string(code))) << e.what();
    EXPECT_NE(std::string(e.what()).find(text), std::string::npos) << "got: " << e.what() << "\nwanted: " << text;
  }
}

template <class Fn>
void expect_error(const std::string& text, const Fn& fn) {
  expect_error(ErrorCode::invalid_argument, text, fn);
}

}  // namespace octomoe::testing
