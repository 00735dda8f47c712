//! How a record is read back from bytes without any unsafe code.

/// A fixed-size value that can be read from the native-endian bytes of a record.
pub trait Field: Sized {
    /// Bytes it takes.
    const SIZE: usize;

    /// Reads it from the first [`Field::SIZE`] bytes; `None` when there are fewer.
    fn read(bytes: &[u8]) -> Option<Self>;
}

macro_rules! integer_field {
    ($($integer:ty),*) => {$(
        impl Field for $integer {
            const SIZE: usize = size_of::<$integer>();

            fn read(bytes: &[u8]) -> Option<Self> {
                bytes.first_chunk().map(|chunk| <$integer>::from_ne_bytes(*chunk))
            }
        }
    )*};
}

integer_field!(u16, u32, i32, u64, i64);

impl<const N: usize> Field for [u8; N] {
    const SIZE: usize = N;

    fn read(bytes: &[u8]) -> Option<Self> {
        bytes.first_chunk().copied()
    }
}

/// Declares a record: the struct, its size and freedom from padding (asserted), and its reader.
macro_rules! record {
    (
        $(#[$meta:meta])*
        pub struct $name:ident: $size:literal {
            $($(#[$field_meta:meta])* pub $field:ident: $type:ty = $offset:literal,)*
        }
    ) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        #[repr(C)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
        }

        const _: () = {
            assert!(size_of::<$name>() == $size, "the record has another size than declared");
            assert!(0 $(+ <$type as $crate::Field>::SIZE)* == $size, "the record has padding");
            $(assert!(core::mem::offset_of!($name, $field) == $offset, "a field lies elsewhere than declared");)*
        };

        impl $crate::Field for $name {
            const SIZE: usize = $size;

            fn read(bytes: &[u8]) -> Option<Self> {
                Some(Self {
                    $($field: <$type as $crate::Field>::read(bytes.get($offset..)?)?,)*
                })
            }
        }
    };
}

pub(crate) use record;
