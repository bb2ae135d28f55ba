// A device that stands in for a GPU where there is none: `other:0`.
//
// Its tensors are in the host's memory, but only operations on this device may read them: each checks that its tensors
// are on one device, as CUDA's operations do, and runs on copies of them on the CPU. What the host has to wait for on a
// real device is counted.
#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/histc.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/CPUGeneratorImpl.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

namespace {
constexpr auto OTHER = c10::DeviceType::PrivateUse1;
std::atomic<int64_t> reads{0};  // how often the host waited for a value or a size
thread_local bool runs = false;  // an operation, on copies

// The device's addresses are none of the host's: whoever reads one of them ends the process.
constexpr uintptr_t FAR = uintptr_t(1) << 56;
void* far(void* near) { return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(near) + FAR); }
void* near(const void* far) { return reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(far) - FAR); }
void release(void* far) { std::free(near(far)); }

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = far(std::malloc(bytes ? bytes : 1));
    return {data, data, &release, c10::Device(OTHER, 0)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(near(to), near(from), bytes); }
};
Memory memory;

struct Hooks final : at::PrivateUse1HooksInterface {
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::Allocator* getPinnedMemoryAllocator() const override { return at::getCPUAllocator(); }
  bool isPinnedPtr(const void*) const override { return false; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override {
    static auto generator = at::make_generator<at::CPUGeneratorImpl>();
    return generator;
  }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return at::make_generator<at::CPUGeneratorImpl>(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto data = memory.allocate(bytes);
    std::memcpy(near(data.get()), near(storage.data()), std::min(bytes, storage.nbytes()));
    storage.set_data_ptr_noswap(std::move(data));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

at::Tensor on_host(const at::Tensor& t) {  // the same memory
  if (t.device().is_cpu()) return t;
  return at::from_blob(near(t.data_ptr()), t.sizes(), t.strides(), t.options().device(at::kCPU));
}

at::Tensor empty(c10::SymIntArrayRef size, std::optional<c10::ScalarType> dtype, std::optional<c10::Layout>,
                 std::optional<c10::Device>, std::optional<bool>, std::optional<c10::MemoryFormat> format) {
  return at::detail::empty_generic(C10_AS_INTARRAYREF_SLOW(size), &memory, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1),
                                   c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<c10::ScalarType> dtype,
                         std::optional<c10::Layout>, std::optional<c10::Device>, std::optional<bool>) {
  return at::detail::empty_strided_generic(C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), &memory,
                                           c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), c10::dtype_or_default(dtype));
}

at::Tensor copy_from(const at::Tensor& self, const at::Tensor& to, bool non_blocking) {
  if (to.device().is_cpu() && !non_blocking && !runs) ++reads;
  on_host(to).copy_(on_host(self));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& self, const at::Tensor& to) {
  at::native::resize_(to, self.sizes());
  return copy_from(self, to, false);
}

at::Scalar scalar(const at::Tensor& self) {
  ++reads;
  return on_host(self).item();
}

at::Tensor as_strided(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride,
                      std::optional<c10::SymInt> offset) {
  auto at_ = offset ? std::optional<int64_t>(offset->guard_int(__FILE__, __LINE__)) : std::nullopt;
  return at::native::as_strided_tensorimpl(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride), at_);
}

at::Tensor view(const at::Tensor& self, c10::SymIntArrayRef size) {
  return at::native::view(self, C10_AS_INTARRAYREF_SLOW(size));
}

at::Tensor reshape_alias(const at::Tensor& self, c10::SymIntArrayRef size, c10::SymIntArrayRef stride) {
  return at::native::_reshape_alias(self, C10_AS_INTARRAYREF_SLOW(size), C10_AS_INTARRAYREF_SLOW(stride));
}

const at::Tensor& resize(const at::Tensor& self, c10::SymIntArrayRef size, std::optional<c10::MemoryFormat>) {
  auto* impl = self.unsafeGetTensorImpl();
  auto sizes = C10_AS_INTARRAYREF_SLOW(size);
  int64_t number = 1;
  for (auto one : sizes) number *= one;
  size_t bytes = (number + self.storage_offset()) * self.element_size();
  if (self.storage().nbytes() < bytes) Hooks().resizePrivateUse1Bytes(self.storage(), bytes);
  impl->set_sizes_contiguous(sizes);
  return self;
}

at::Tensor& set_storage(at::Tensor& self, at::Storage source, c10::SymInt offset, c10::SymIntArrayRef size,
                        c10::SymIntArrayRef stride) {
  return at::native::set_storage_cpu_(self, source, offset.guard_int(__FILE__, __LINE__), C10_AS_INTARRAYREF_SLOW(size),
                                      C10_AS_INTARRAYREF_SLOW(stride));
}

at::Tensor& set_source(at::Tensor& self, at::Storage source) {
  int64_t size = source.nbytes() / self.element_size();
  return at::native::set_storage_cpu_(self, source, 0, {size}, {1});
}

at::Tensor histc(const at::Tensor& self, int64_t bins, const at::Scalar& min, const at::Scalar& max) {  // of integers too
  return at::histc(on_host(self).to(at::kFloat), bins, min, max).to(self.scalar_type()).to(self.device());
}

at::Tensor convolution(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       c10::IntArrayRef stride, c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed,
                       c10::IntArrayRef output_padding, int64_t groups) {
  std::optional<at::Tensor> added;
  if (bias && bias->defined()) added = on_host(*bias);
  auto result = at::convolution(on_host(x), on_host(weight), added, stride, padding, dilation, transposed, output_padding, groups);
  return result.to(x.device());
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> convolution_backward(
    const at::Tensor& gradient, const at::Tensor& x, const at::Tensor& weight, c10::IntArrayRef stride,
    c10::IntArrayRef padding, c10::IntArrayRef dilation, bool transposed, c10::IntArrayRef output_padding,
    int64_t groups, std::array<bool, 3> mask) {
  auto found = at::convolution_backward(on_host(gradient), on_host(x), on_host(weight), weight.sizes().slice(0, 1), stride,
                                        padding, dilation, transposed, output_padding, groups, mask);
  auto there = [&](const at::Tensor& t) { return t.defined() ? t.to(x.device()) : t; };
  return {there(std::get<0>(found)), there(std::get<1>(found)), there(std::get<2>(found))};
}

bool may_be_elsewhere(const std::string& op, size_t argument) {  // as in CUDA, which copies indices
  return (op == "aten::index" || op == "aten::index_put_" || op == "aten::_index_put_impl_" || op == "aten::index_put") && argument == 1;
}

void check(const c10::OperatorHandle& op, const torch::jit::Stack& stack) {
  const auto& schema = op.schema();
  const auto number = schema.arguments().size();
  const auto begin = stack.size() - number;
  bool here = false;
  std::string elsewhere;
  auto see = [&](const at::Tensor& t, size_t i) {
    if (!t.defined()) return;
    if (t.device().type() == OTHER) here = true;
    else if (t.dim() > 0 && !may_be_elsewhere(schema.name(), i))
      elsewhere = schema.arguments()[i].name() + " " + c10::str(t.sizes());
  };
  for (size_t i = 0; i < number; ++i) {
    const auto& value = stack[begin + i];
    if (value.isTensor()) see(value.toTensor(), i);
    else if (value.isTensorList()) for (const auto& t : value.toTensorVector()) see(t, i);
    else if (value.isOptionalTensorList()) {
      for (const auto& t : value.toOptionalTensorList()) { std::optional<at::Tensor> one = t; if (one) see(*one, i); }
    }
  }
  TORCH_CHECK(!here || elsewhere.empty(), "tensors on two devices: ", schema.name(), " got ", elsewhere, " on the host");
}

void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  check(op, *stack);
  const auto& name = op.schema().name();  // the first four give the host a size
  for (const auto* waits : {"aten::nonzero", "aten::_unique2", "aten::masked_select", "aten::bincount", "aten::equal"})
    if (name == waits) ++reads;
  runs = true;
  try {
    at::native::cpu_fallback(op, stack, /*error_on_views=*/true);
  } catch (...) {
    runs = false;
    throw;
  }
  runs = false;
}
}  // namespace

struct Guard final : c10::impl::DeviceGuardImplInterface {  // one device, one stream, and all work is done at once
  static constexpr c10::DeviceType static_type = OTHER;
  Guard() = default;
  explicit Guard(c10::DeviceType) {}
  c10::DeviceType type() const override { return OTHER; }
  c10::Device exchangeDevice(c10::Device) const override { return {OTHER, 0}; }
  c10::Device getDevice() const override { return {OTHER, 0}; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::Stream getStream(c10::Device device) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream getNewStream(c10::Device device, int) const override { return c10::Stream(c10::Stream::DEFAULT, device); }
  c10::Stream exchangeStream(c10::Stream stream) const override { return stream; }
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  void record(void**, const c10::Stream&, const c10::DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void*, const c10::DeviceIndex) const noexcept override {}
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {}
  void synchronizeDevice(const c10::DeviceIndex) const override {}
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &scalar);
  m.impl("as_strided", &as_strided);
  m.impl("view", &view);
  m.impl("_reshape_alias", &reshape_alias);
  m.impl("resize_", &resize);
  m.impl("histc", &histc);
  m.impl("convolution_overrideable", &convolution);
  m.impl("convolution_backward_overrideable", &convolution_backward);
  m.impl("unfold", &at::native::unfold);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("set_.source_Storage", &set_source);
}
TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fall_back>()); }

TORCH_LIBRARY(other_device, m) {
  m.def("reads() -> int", [] { return reads.load(); });
}

const bool registered = [] {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  c10::SetAllocator(OTHER, &memory);
  return true;
}();
