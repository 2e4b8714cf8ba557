// OCTOMOE_API: what the shared library exports. The library is compiled with hidden visibility; a public header opens
// its namespace as `namespace octomoe OCTOMOE_API {`, so exactly what the public headers declare can be called from
// outside, and a new public function cannot be forgotten. Internal headers write `namespace octomoe {`.
#pragma once

#if defined(__GNUC__) || defined(__clang__)
#define OCTOMOE_API __attribute__((visibility("default")))
#else
#define OCTOMOE_API
#endif
