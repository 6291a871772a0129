// Tells a torch that was built without CUDA that there is one CUDA device, as far as autograd asks.
// Its tensors must be fake ones: no memory, no kernel, no stream stands behind it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;

// Autograd sets device and stream around every node of the backward. The base class calls all of them -1.
struct OneDevice : c10::impl::NoOpDeviceGuardImpl<CUDA> {
  c10::Device device() const { return {CUDA, 0}; }
  c10::Stream stream() const { return c10::Stream(c10::Stream::DEFAULT, device()); }
  c10::Device getDevice() const override { return device(); }
  c10::Device exchangeDevice(c10::Device) const override { return device(); }
  c10::Stream getStream(c10::Device) const noexcept override { return stream(); }
  c10::Stream getNewStream(c10::Device, int) const override { return stream(); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return stream(); }
};

}  // namespace

namespace at {

// What makes CUDA the process's accelerator; the rest stays "not built".
struct HooksOfOneDevice : CUDAHooksInterface {
  explicit HooksOfOneDevice(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
};

C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, HooksOfOneDevice)

}  // namespace at

extern "C" bool pretend_cuda() {
  static OneDevice guard;
  c10::impl::registerDeviceGuard(CUDA, &guard);
  return at::detail::getCUDAHooks().hasPrimaryContext(0);  // false: somebody had asked for hooks before
}
