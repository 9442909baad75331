// Runs a whole network, or a part of one, in one call: see plan.h.
//
// With many images each thread takes some of them through all steps, so that maps stay in its own
// cache and no thread waits for another. With few, threads share each step: they take tasks in order,
// and begin those of a step when all of the step before are done.

#if defined(__x86_64__)

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>

#include "bf16.h"
#include "kernels.h"

namespace resfast::network {
namespace {

// Whether the processor has the instructions for lines of float32.
bool f32_supported() {
  return detect_isa() != Isa::baseline && __builtin_cpu_supports("fma");
}

const Kernels& kernels_for(const Header& header) {
  if (!header.wide) return kBf16;
#if defined(RESFAST_AVX512_EMULATED)
  return kF32Avx512;
#else
  return detect_isa() == Isa::avx512 ? kF32Avx512 : kF32Avx2;
#endif
}

// What a step's tasks are parts of: tiles, rows of the result or images.
int64_t units(const Step& step) {
  switch (step.kind) {
    case kConv:
    case kWinograd:
    case kGathered:
    case kDepthwise: return step.tile_count;
    case kEnter: return step.images * step.height;
    case kMean:
    case kHead: return step.images;
    default: return step.images * step.out_height;
  }
}

void run(const Kernels& kernels, const Step& step, const Memory& memory, int64_t task) {
  if (step.first_image >= memory.images) return;
  const int64_t count = units(step), part = task / step.panel_parts;
  const int64_t panels = ceil_div(step.outputs, kTile), which = task % step.panel_parts;
  const int64_t begin = count * part / step.tile_parts, end = count * (part + 1) / step.tile_parts;
  switch (step.kind) {
    case kConv:
    case kGathered:
    case kWinograd: {
      const auto conv = step.kind == kConv ? kernels.conv
          : step.kind == kGathered       ? kernels.gathered
                                         : kernels.winograd;
      return conv(step, memory, begin, end, panels * which / step.panel_parts,
                  panels * (which + 1) / step.panel_parts);
    }
    case kHead:
      return kernels.head(step, memory, begin, end, step.outputs * which / step.panel_parts,
                          step.outputs * (which + 1) / step.panel_parts);
    case kDepthwise: return kernels.depthwise(step, memory, begin, end);
    case kPatches: return kernels.patches(step, memory, begin, end);
    case kEnter: return kernels.enter(step, memory, begin, end);
    case kMaxPool: return kernels.max_pool(step, memory, begin, end);
    case kAveragePool: return kernels.average_pool(step, memory, begin, end);
    case kPointwise: return kernels.pointwise(step, memory, begin, end);
    default: return kernels.mean(step, memory, begin, end);
  }
}

int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// Returns the nanoseconds that it waited.
int64_t wait_until(const std::atomic<int64_t>& done, int64_t count) {
  if (done.load(std::memory_order_acquire) >= count) return 0;
  const int64_t start = now_ns();
  for (int64_t spins = 0; done.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 4096) _mm_pause();
    else sched_yield();
  }
  return now_ns() - start;
}

// Leaves threads out while something else computes on their cores, as the threads of another library do
// that spin after a call. Threads that share steps wait for each other: one without a core costs the
// others a time slice of the scheduler per step, many times what its share of the work would take them.
class Crowding {
 public:
  int64_t threads() const {
    const int64_t all = torch::stable::get_num_threads();
    return now_ns() < until_ ? std::max<int64_t>(1, all - left_out_) : all;
  }

  // After a call by `used` threads of which the least busy one computed for `busy` of `total` ns.
  void report(int64_t used, int64_t busy, int64_t total) {
    const int64_t all = torch::stable::get_num_threads();
    if (used > 1 && busy < total / 2) {
      left_out_ = all - used + 1;
      pause_ = std::min(2 * pause_, kLongestPause);
      until_ = now_ns() + pause_;
    } else if (used == all) {
      pause_ = kShortestPause;
    }
  }

 private:
  static constexpr int64_t kShortestPause = 4'000'000, kLongestPause = 128'000'000; // ns
  std::atomic<int64_t> left_out_{0}, until_{0}, pause_{kShortestPause};
};

Crowding crowding;

// All items, each by the thread that takes it.
void run_apart(const Header& header, const Step* steps, const Memory& first, int64_t images,
               int64_t arenas) {
  const Kernels& kernels = kernels_for(header);
  std::atomic<int64_t> taken{0}, arena{0};
  const int64_t items = ceil_div(images, header.images);
  const int64_t results = header.out_height * header.out_width * header.out_channels *
      (header.head || header.wide_result ? sizeof(float) : sizeof(uint16_t));
  torch::stable::parallel_for(0, std::min(arenas, items), 1, [&](int64_t, int64_t) {
    const amx::Tiles tiles(!header.wide && amx::supported());
    Memory memory = first;
    memory.arena += arena.fetch_add(1) * header.arena_lines * kLine;
    for (int64_t item; (item = taken.fetch_add(1)) < items;) {
      memory.first = item * header.images;
      memory.result = static_cast<char*>(first.result) + memory.first * results;
      memory.images = images - memory.first;
      for (int64_t i = 0; i < header.steps; ++i) {
        const int64_t tasks = steps[i].tile_parts * steps[i].panel_parts;
        for (int64_t task = 0; task < tasks; ++task) run(kernels, steps[i], memory, task);
      }
    }
  });
}

// One item by all threads.
void run_together(const Header& header, const Step* steps, const Memory& memory) {
  const Kernels& kernels = kernels_for(header);
  const int64_t threads = crowding.threads(), start = now_ns();
  std::atomic<int64_t> taken{0}, done{0}, least_busy{INT64_MAX};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    const amx::Tiles tiles(!header.wide && amx::supported());
    const int64_t entered = now_ns();
    int64_t step = 0, waited = 0;
    for (int64_t task; (task = taken.fetch_add(1, std::memory_order_relaxed)) < header.tasks;) {
      while (step + 1 < header.steps && steps[step + 1].first_task <= task) ++step;
      waited += wait_until(done, steps[step].first_task);
      run(kernels, steps[step], memory, task - steps[step].first_task);
      done.fetch_add(1, std::memory_order_release);
    }
    const int64_t busy = now_ns() - entered - waited;
    for (int64_t least = least_busy; busy < least && !least_busy.compare_exchange_weak(least, busy);) {
    }
  });
  crowding.report(threads, least_busy, now_ns() - start);
}

void check_memory(const char* name, const Tensor& tensor, ScalarType dtype) {
  if (tensor.scalar_type() != dtype || !tensor.is_contiguous() || !tensor.is_cpu())
    fail(name, " is ", dtype_name(tensor.scalar_type()), " ", shape_name(tensor.sizes()),
         "; expected contiguous ", dtype_name(dtype), " on the CPU");
}

Input check_input(const Tensor& x, const Header& header) {
  const bool wide = x.scalar_type() == ScalarType::Float;
  if (!wide && x.scalar_type() != ScalarType::BFloat16)
    fail("x is ", dtype_name(x.scalar_type()), "; expected torch.bfloat16 or torch.float32");
  if (!x.is_cpu() || x.dim() != 4 || x.size(0) < 1 || x.size(1) != header.channels ||
      x.size(2) != header.height || x.size(3) != header.width)
    fail("x is ", shape_name(x.sizes()), "; expected ",
         shape_name(std::vector<int64_t>{-1, header.channels, header.height, header.width}),
         " on the CPU");
  const bool lined_up = wide == (header.wide != 0) && is_channels_last(x);
  Input input{x.const_data_ptr(), wide, lined_up, {}};
  for (int axis = 0; axis < 4; ++axis) input.stride[axis] = x.stride(axis);
  if (input.lined_up) // strides of axes of size 1 say nothing
    input.stride[2] = header.width * header.channels, input.stride[0] = header.height * input.stride[2];
  return input;
}

// Pointer to float32 [sizes] of the head.
const float* head_values(const char* name, const Tensor& tensor, const std::vector<int64_t>& sizes) {
  check_memory(name, tensor, ScalarType::Float);
  bool same = tensor.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t axis = 0; same && axis < tensor.dim(); ++axis)
    same = tensor.size(axis) == sizes[axis];
  if (!same) fail(name, " is ", shape_name(tensor.sizes()), "; expected ", shape_name(sizes));
  return static_cast<const float*>(tensor.const_data_ptr());
}

Tensor network_run(
    const Tensor& x, const Tensor& program, const Tensor& tables, const Tensor& constants,
    const Tensor& arena, const std::optional<Tensor>& head_weight,
    const std::optional<Tensor>& head_bias) {
  check_memory("program", program, ScalarType::Long);
  check_memory("tables", tables, ScalarType::Int);
  check_memory("constants", constants, ScalarType::Byte);
  check_memory("arena", arena, ScalarType::Byte);
  constexpr int64_t kHeader = sizeof(Header) / 8, kStep = sizeof(Step) / 8;
  const auto& header = *static_cast<const Header*>(program.const_data_ptr());
  if (program.numel() < kHeader || header.magic != kMagic ||
      program.numel() != kHeader + header.steps * kStep)
    fail("program of ", program.numel(), " values is none of this version");
  if (header.wide ? !f32_supported() : !bf16_supported())
    fail("this processor has no ", header.wide ? "AVX2 with FMA" : "AVX512-BF16");
  Memory memory{};
  memory.input = check_input(x, header);
  const int64_t arenas = arena.numel() / (header.arena_lines * kLine);
  if (arenas < 1 || reinterpret_cast<uintptr_t>(arena.const_data_ptr()) % kLine ||
      reinterpret_cast<uintptr_t>(constants.const_data_ptr()) % kLine)
    fail("arena or constants are too small, or not aligned to 64 bytes");
  memory.images = x.size(0);
  if (header.together && memory.images != header.images)
    fail("x has ", memory.images, " images; expected ", header.images);
  if (header.head && !head_weight) fail("head_weight is missing");
  if (header.head)
    memory.head = head_values("head_weight", *head_weight, {header.out_channels, header.head});
  if (header.head && head_bias)
    memory.head_bias = head_values("head_bias", *head_bias, {header.out_channels});
  Tensor out = header.head
      ? torch::stable::empty({memory.images, header.out_channels}, ScalarType::Float)
      : torch::stable::empty(
            {memory.images, header.out_channels, header.out_height, header.out_width},
            header.wide_result ? ScalarType::Float : ScalarType::BFloat16, std::nullopt, std::nullopt, std::nullopt,
            torch::headeronly::MemoryFormat::ChannelsLast);
  const auto* steps = reinterpret_cast<const Step*>(&header + 1);
  memory.result = out.mutable_data_ptr();
  memory.wide_result = header.wide_result;
  memory.arena = static_cast<char*>(arena.mutable_data_ptr());
  memory.constants = static_cast<const char*>(constants.const_data_ptr());
  memory.tables = static_cast<const int32_t*>(tables.const_data_ptr());
  if (header.together) run_together(header, steps, memory);
  else run_apart(header, steps, memory, memory.images, arenas);
  return out;
}

bool network_f32_supported() { return f32_supported(); }

int64_t network_threads() { return crowding.threads(); }

} // namespace
} // namespace resfast::network

STABLE_TORCH_LIBRARY_FRAGMENT(resfast, m) {
  m.def("network_f32_supported() -> bool");
  m.def("network_threads() -> int"); // that would share the steps of a call now
  m.def(
      "network_run(Tensor x, Tensor program, Tensor tables, Tensor constants, Tensor(a!) arena, "
      "Tensor? head_weight=None, Tensor? head_bias=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CompositeExplicitAutograd, m) {
  m.impl("network_f32_supported", TORCH_BOX(&resfast::network::network_f32_supported));
  m.impl("network_threads", TORCH_BOX(&resfast::network::network_threads));
}

STABLE_TORCH_LIBRARY_IMPL(resfast, CPU, m) {
  m.impl("network_run", TORCH_BOX(&resfast::network::network_run));
}

#endif
