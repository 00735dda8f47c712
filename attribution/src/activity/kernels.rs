//! What a kernel does, by its name.

/// What a kernel does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum KernelClass {
    /// Matrix multiplication.
    Gemm,
    /// Fused attention.
    Attention,
    /// Convolution.
    Convolution,
    /// Normalisation and its gradient.
    Normalisation,
    /// Element by element, reductions, softmax, pooling, sorting.
    Elementwise,
    /// Optimiser updates.
    Optimiser,
    /// Communication between GPUs.
    Communication,
    /// Moving data within the device: copies, gathers, embeddings, layout changes.
    Memory,
    /// No pattern of the table fits.
    Unknown,
}

impl KernelClass {
    /// The stable name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Gemm => "gemm",
            Self::Attention => "attention",
            Self::Convolution => "convolution",
            Self::Normalisation => "normalisation",
            Self::Elementwise => "elementwise",
            Self::Optimiser => "optimiser",
            Self::Communication => "communication",
            Self::Memory => "memory",
            Self::Unknown => "unknown",
        }
    }

    /// Whether the kernel multiplies matrices, where tensor units can work.
    #[must_use]
    pub const fn is_matmul(self) -> bool {
        matches!(self, Self::Gemm | Self::Attention | Self::Convolution)
    }

    /// The class of a kernel by its name, case ignored: that of the first row of [`TABLE`] with a part of the name.
    #[must_use]
    pub fn of(name: &str) -> Self {
        let name = name.to_ascii_lowercase();
        TABLE
            .iter()
            .find(|(part, _)| name.contains(part))
            .map_or(Self::Unknown, |(_, class)| *class)
    }
}

/// The units a matrix kernel multiplies with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Pipe {
    /// Tensor or matrix units.
    Tensor,
    /// The plain FP32 units.
    Plain,
}

impl Pipe {
    /// The units by the kernel's name, case ignored; `None` when the name does not tell.
    #[must_use]
    pub fn of(name: &str) -> Option<Self> {
        let name = name.to_ascii_lowercase();
        PIPES
            .iter()
            .find(|(part, _)| name.contains(part))
            .map(|(_, pipe)| *pipe)
    }
}

/// Parts of matrix kernels' names that tell the units, in order of precedence: shapes of tensor instructions
/// (`s1688` is FP32 in, TF32 multiplied), then the libraries' names for plain FP32 multiplication.
const PIPES: &[(&str, Pipe)] = &[
    ("tensorop", Pipe::Tensor),
    ("1688", Pipe::Tensor),
    ("16816", Pipe::Tensor),
    ("i8816", Pipe::Tensor),
    ("s884", Pipe::Tensor),
    ("h884", Pipe::Tensor),
    ("hmma", Pipe::Tensor),
    ("wgmma", Pipe::Tensor),
    ("tf32", Pipe::Tensor),
    ("bf16", Pipe::Tensor),
    ("nvjet", Pipe::Tensor),
    ("flash", Pipe::Tensor),
    ("_mfma", Pipe::Tensor),
    ("_mi16x16", Pipe::Tensor),
    ("_mi32x32", Pipe::Tensor),
    ("simt", Pipe::Plain),
    ("ffma", Pipe::Plain),
    ("sgemm", Pipe::Plain),
    ("scudnn", Pipe::Plain),
    ("gemmsn", Pipe::Plain),
    ("gemv", Pipe::Plain),
];

/// Parts of kernel names in lower case, in order of precedence.
///
/// Communication is any name with `nccl` or `rccl`, plus the device-side libraries that replace them. Names of
/// libraries come before names of operations, since templates name the operations they fuse.
pub const TABLE: &[(&str, KernelClass)] = &[
    ("nccl", KernelClass::Communication),
    ("rccl", KernelClass::Communication),
    ("nvshmem", KernelClass::Communication),
    ("cross_device_reduce", KernelClass::Communication),
    ("multimem_all_", KernelClass::Communication),
    ("deep_ep", KernelClass::Communication),
    ("multi_tensor_apply", KernelClass::Optimiser),
    ("adam", KernelClass::Optimiser),
    ("adagrad", KernelClass::Optimiser),
    ("fused_sgd", KernelClass::Optimiser),
    ("flash_", KernelClass::Attention),
    ("fmha", KernelClass::Attention),
    ("attention", KernelClass::Attention),
    ("attn", KernelClass::Attention),
    ("mha_", KernelClass::Attention),
    ("bn_fw", KernelClass::Normalisation),
    ("bn_bw", KernelClass::Normalisation),
    ("batch_norm", KernelClass::Normalisation),
    ("batchnorm", KernelClass::Normalisation),
    ("layer_norm", KernelClass::Normalisation),
    ("layernorm", KernelClass::Normalisation),
    ("group_norm", KernelClass::Normalisation),
    ("groupnorm", KernelClass::Normalisation),
    ("rms_norm", KernelClass::Normalisation),
    ("rmsnorm", KernelClass::Normalisation),
    ("gammabeta", KernelClass::Normalisation),
    ("rowwisemoments", KernelClass::Normalisation),
    ("computeinternalgradients", KernelClass::Normalisation),
    ("welford", KernelClass::Normalisation),
    ("nchwtonhwc", KernelClass::Memory),
    ("nhwctonchw", KernelClass::Memory),
    ("batched_transpose", KernelClass::Memory),
    ("winograd", KernelClass::Convolution),
    ("wgrad", KernelClass::Convolution),
    ("dgrad", KernelClass::Convolution),
    ("fprop", KernelClass::Convolution),
    ("convolve", KernelClass::Convolution),
    ("scudnn", KernelClass::Convolution),
    ("hcudnn", KernelClass::Convolution),
    ("i8816cudnn", KernelClass::Convolution),
    ("cudnn::cnn", KernelClass::Convolution),
    ("computeoffsets", KernelClass::Convolution),
    ("computeboffsets", KernelClass::Convolution),
    ("miopenconv", KernelClass::Convolution),
    ("miopensp3asm", KernelClass::Convolution),
    ("igemm", KernelClass::Convolution),
    ("conv2d", KernelClass::Convolution),
    ("conv_", KernelClass::Convolution),
    ("im2col", KernelClass::Convolution),
    ("col2im", KernelClass::Convolution),
    ("convolution", KernelClass::Convolution),
    ("gemm", KernelClass::Gemm),
    ("gemv", KernelClass::Gemm),
    ("gemv2t", KernelClass::Gemm),
    ("splitkreduce", KernelClass::Gemm),
    ("cublaslt", KernelClass::Gemm),
    ("cijk_", KernelClass::Gemm),
    ("cutlass", KernelClass::Gemm),
    ("nvjet", KernelClass::Gemm),
    ("xmma", KernelClass::Gemm),
    ("tensorop", KernelClass::Gemm),
    ("matmul", KernelClass::Gemm),
    ("dot_kernel", KernelClass::Gemm),
    ("reduce_1block_kernel", KernelClass::Gemm),
    ("catarray", KernelClass::Memory),
    ("direct_copy", KernelClass::Memory),
    ("copy_", KernelClass::Memory),
    ("embedding", KernelClass::Memory),
    ("embs", KernelClass::Memory),
    ("permute", KernelClass::Memory),
    ("transpose", KernelClass::Memory),
    ("gather", KernelClass::Memory),
    ("scatter", KernelClass::Memory),
    ("index", KernelClass::Memory),
    ("indices", KernelClass::Memory),
    ("fill", KernelClass::Memory),
    ("memset", KernelClass::Memory),
    ("memcpy", KernelClass::Memory),
    ("copybuffer", KernelClass::Memory),
    ("subtensorop", KernelClass::Elementwise),
    ("optensor", KernelClass::Elementwise),
    ("op2dtensor", KernelClass::Elementwise),
    ("softmax", KernelClass::Elementwise),
    ("cross_entropy", KernelClass::Elementwise),
    ("nll_loss", KernelClass::Elementwise),
    ("nllcriterion", KernelClass::Elementwise),
    ("elementwise", KernelClass::Elementwise),
    ("element_wise", KernelClass::Elementwise),
    ("reduce", KernelClass::Elementwise),
    ("pool", KernelClass::Elementwise),
    ("dropout", KernelClass::Elementwise),
    ("gelu", KernelClass::Elementwise),
    ("silu", KernelClass::Elementwise),
    ("relu", KernelClass::Elementwise),
    ("threshold", KernelClass::Elementwise),
    ("epilogue", KernelClass::Elementwise),
    ("scalepackedtensor", KernelClass::Elementwise),
    ("scaletensor", KernelClass::Elementwise),
    ("tensor_apply", KernelClass::Elementwise),
    ("pointwise", KernelClass::Elementwise),
    ("triton_", KernelClass::Elementwise),
    ("sort", KernelClass::Elementwise),
    ("scan", KernelClass::Elementwise),
    ("histogram", KernelClass::Elementwise),
    ("runlength", KernelClass::Elementwise),
    ("distribution", KernelClass::Elementwise),
    ("cub::", KernelClass::Elementwise),
    ("cumsum", KernelClass::Elementwise),
    ("at::native", KernelClass::Elementwise),
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_real_traces_have_their_class() {
        let cases = [
            (
                "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)",
                KernelClass::Communication,
            ),
            ("NCCLKernel_x", KernelClass::Communication),
            ("volta_sgemm_128x32_nt", KernelClass::Gemm),
            (
                "void cutlass::Kernel<cutlass_80_tensorop_s1688gemm_64x64_16x6_nn_align4>",
                KernelClass::Gemm,
            ),
            ("Cijk_Ailk_Bljk_BBS_BH_Bias_HA_S_SAV", KernelClass::Gemm),
            (
                "void implicit_convolve_sgemm<float, float, 1024>",
                KernelClass::Convolution,
            ),
            (
                "void cudnn::bn_bw_1C11_kernel_new<float, float, float2, 512, true, 1>",
                KernelClass::Normalisation,
            ),
            (
                "void multi_tensor_apply_kernel<TensorListMetadata<4>, AdamFunctor<float>>",
                KernelClass::Optimiser,
            ),
            (
                "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>",
                KernelClass::Elementwise,
            ),
            (
                "void flash_fwd_kernel<Flash_fwd_kernel_traits<128>>",
                KernelClass::Attention,
            ),
            (
                "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<float>",
                KernelClass::Memory,
            ),
            ("my_secret_kernel", KernelClass::Unknown),
            ("", KernelClass::Unknown),
        ];
        for (name, class) in cases {
            assert_eq!(KernelClass::of(name), class, "{name}");
        }
    }

    #[test]
    fn tensor_units_are_told_from_plain_ones() {
        let cases = [
            (
                "void cutlass::Kernel<cutlass_80_tensorop_s1688gemm_64x64_16x6_nn_align4>",
                Some(Pipe::Tensor),
            ),
            ("ampere_bf16_s16816gemm_bf16_128x64_ldg8", Some(Pipe::Tensor)),
            ("volta_h884gemm_64x64_ldg8_nn", Some(Pipe::Tensor)),
            ("volta_sgemm_128x32_nt", Some(Pipe::Plain)),
            ("volta_scudnn_128x64_relu_interior_nn_v1", Some(Pipe::Plain)),
            ("my_secret_gemm", None),
        ];
        for (name, pipe) in cases {
            assert_eq!(Pipe::of(name), pipe, "{name}");
        }
    }

    #[test]
    fn the_tables_are_in_lower_case() {
        let parts = TABLE.iter().map(|(part, _)| part);
        for part in parts.chain(PIPES.iter().map(|(part, _)| part)) {
            assert_eq!(*part, part.to_ascii_lowercase());
        }
    }
}
