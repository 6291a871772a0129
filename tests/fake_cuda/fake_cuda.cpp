// Tells torch that there is one CUDA device, as far as autograd asks: under a torch that was built
// without CUDA, and under one that was built with it and finds no GPU. Its tensors must be fake
// ones: no memory, no kernel, no stream stands behind it.
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace {

constexpr auto CUDA = c10::DeviceType::CUDA;
const c10::Device DEVICE(CUDA, 0);
const c10::Stream STREAM(c10::Stream::DEFAULT, DEVICE);

// Autograd sets device and stream around every node of the backward pass.
struct OneDevice : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return CUDA; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Stream getStream(c10::Device) const override { return STREAM; }
  c10::Stream getNewStream(c10::Device, int) const override { return STREAM; }
  c10::Stream exchangeStream(c10::Stream) const override { return STREAM; }
};

}  // namespace

namespace at {

// What makes CUDA the process's accelerator; the rest stays "not built".
struct HooksOfOneDevice : CUDAHooksInterface {
  explicit HooksOfOneDevice(CUDAHooksArgs) {}
  bool isBuilt() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  long versionCuDNN() const override { return 0; }
};

// Preferred to the hooks of a torch that was built with CUDA, which come later.
C10_REGISTER_CLASS_WITH_PRIORITY(
    CUDAHooksRegistry, CUDAHooks, c10::REGISTRY_PREFERRED, HooksOfOneDevice)

}  // namespace at

// To be called before torch is imported, since the hooks are asked for but once; and after it,
// since a torch that was built with CUDA brings a guard of its own. False: it came too late.
extern "C" bool pretend_cuda() {
  static OneDevice guard;
  c10::impl::DeviceGuardImplRegistrar registrar(CUDA, &guard);
  return at::detail::getCUDAHooks().hasPrimaryContext(0);
}
