//! Reads arrays saved by numpy. Their type is not checked: the caller knows it.

use std::path::Path;

/// A number stored in the file with the same bytes as in memory.
pub trait Plain: Sized {
    const BYTES: usize;
    fn from_bytes(bytes: &[u8]) -> Self;
}

impl Plain for u32 {
    const BYTES: usize = 4;
    fn from_bytes(bytes: &[u8]) -> Self {
        Self::from_ne_bytes(bytes.try_into().expect("4 bytes"))
    }
}

impl Plain for u64 {
    const BYTES: usize = 8;
    fn from_bytes(bytes: &[u8]) -> Self {
        Self::from_ne_bytes(bytes.try_into().expect("8 bytes"))
    }
}

/// Read all values of a one-dimensional array.
pub fn read<T: Plain>(path: &Path) -> Vec<T> {
    let bytes = std::fs::read(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert_eq!(&bytes[..8], b"\x93NUMPY\x01\x00", "{}: not an array of version 1.0", path.display());
    let header = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
    bytes[10 + header..].chunks_exact(T::BYTES).map(T::from_bytes).collect()
}
