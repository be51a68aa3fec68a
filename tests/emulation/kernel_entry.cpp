// Compiled once per kernel, with KERNEL_FILE and KERNEL_NAME: how the engine calls it. `arguments` points to the values
// of its parameters, as for the driver's own launch call.
#include KERNEL_FILE

#include <cstddef>
#include <utility>

namespace emulator {
namespace {

template <class... Parameters, std::size_t... I>
void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<Parameters*>(arguments[I])...);
}

template <class... Parameters>
void call(void (*kernel)(Parameters...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Parameters...>());
}

}  // namespace

void enter(void** arguments) { call(KERNEL_NAME, arguments); }

#ifdef FP16
extern const bool fp16 = true;
#else
extern const bool fp16 = false;
#endif

}  // namespace emulator
