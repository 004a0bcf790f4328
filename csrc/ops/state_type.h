// The dtypes of a step, for host and device.
#pragma once

namespace deqcore {

// The dtype of f; the iterate and the history are double for `f64` and float otherwise.
enum class StateType { f64, f32, bf16, f16 };

}  // namespace deqcore
