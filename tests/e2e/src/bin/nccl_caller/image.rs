//! A loaded library with its local symbols.

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::path::Path;

use libloading::{Library, Symbol};
use object::read::elf::{FileHeader as _, Sym as _};
use object::{Endianness, elf};

/// A library in this process.
pub(crate) struct Image {
    library: Library,
    base: usize,
    locals: HashMap<String, usize>,
}

impl Image {
    pub(crate) fn load(path: &Path) -> Result<Self, Box<dyn Error>> {
        let path = fs::canonicalize(path)?;
        let file = fs::File::open(&path)?;
        let cache = object::ReadCache::new(&file);
        let locals = locals(&cache)?;
        // SAFETY: NCCL's initialisers have no preconditions.
        let library = unsafe { Library::new(&path)? };
        let base = base(&path)?;
        Ok(Self {
            library,
            base,
            locals,
        })
    }

    /// An exported function, if this version has it. Its type is the caller's promise.
    pub(crate) fn exported<T>(&self, name: &str) -> Option<Symbol<'_, T>> {
        // SAFETY: callers name functions with the types of nccl.h.
        unsafe { self.library.get(name.as_bytes()) }.ok()
    }

    /// The address of a local function or variable, by its full name.
    pub(crate) fn local(&self, name: &str) -> Option<usize> {
        self.locals.get(name).map(|value| self.base + value)
    }

    /// The addresses of local functions and variables whose name starts so.
    pub(crate) fn locals_with(&self, prefix: &str) -> impl Iterator<Item = (&str, usize)> {
        self.locals
            .iter()
            .filter(move |(name, _)| name.starts_with(prefix))
            .map(|(name, value)| (name.as_str(), self.base + value))
    }
}

fn locals<'data>(data: impl object::ReadRef<'data>) -> Result<HashMap<String, usize>, Box<dyn Error>> {
    let header = elf::FileHeader64::<Endianness>::parse(data)?;
    let endian = header.endian()?;
    let sections = header.sections(endian, data)?;
    let table = sections.symbols(endian, data, elf::SHT_SYMTAB)?;
    let mut locals = HashMap::new();
    let kinds = [elf::STT_FUNC, elf::STT_OBJECT];
    for symbol in table.iter().filter(|symbol| kinds.contains(&symbol.st_type())) {
        let name = String::from_utf8_lossy(table.symbol_name(endian, symbol)?).into_owned();
        locals
            .entry(name)
            .or_insert(usize::try_from(symbol.st_value(endian))?);
    }
    Ok(locals)
}

/// Where the start of the file is mapped.
fn base(path: &Path) -> Result<usize, Box<dyn Error>> {
    let maps = fs::read_to_string("/proc/self/maps")?;
    let first = maps
        .lines()
        .find(|line| line.ends_with(&path.display().to_string()) && line.contains(" 00000000 "))
        .ok_or("the library is not mapped")?;
    let (start, _) = first.split_once('-').ok_or("a strange line in maps")?;
    Ok(usize::from_str_radix(start, 16)?)
}
