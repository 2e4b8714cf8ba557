// The whole public API. See README.md for an example.
#pragma once

#include "octomoe/calibrate.h"
#include "octomoe/checkpoint.h"
#include "octomoe/error.h"
#include "octomoe/layer.h"
#include "octomoe/log.h"
#include "octomoe/packs.h"
#include "octomoe/scheme.h"
#include "octomoe/tensor.h"
#include "octomoe/version.h"
#include "octomoe/weights.h"
