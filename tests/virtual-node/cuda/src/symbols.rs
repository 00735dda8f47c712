//! Entry points by name, as `cuGetProcAddress` gives them out.

use std::ffi::{CStr, CString, c_void};

/// The address of a driver function by its name without version suffix; null when there is none.
pub(crate) fn lookup(name: &CStr) -> *mut c_void {
    let Ok(name) = name.to_str() else {
        return std::ptr::null_mut();
    };
    if !name.starts_with("cu") {
        return std::ptr::null_mut();
    }
    // Newest version of the function first, as the real one does.
    let candidates = [format!("{name}_v2"), name.to_owned()];
    candidates
        .iter()
        .map(|candidate| own_symbol(candidate))
        .find(|at| !at.is_null())
        .unwrap_or(std::ptr::null_mut())
}

fn own_symbol(name: &str) -> *mut c_void {
    let Ok(name) = CString::new(name) else {
        return std::ptr::null_mut();
    };
    // SAFETY: `info` is filled by dladdr for an address inside this library; the name it gives stays loaded with it.
    unsafe {
        let mut info: libc::Dl_info = std::mem::zeroed();
        if libc::dladdr(lookup as *const c_void, &raw mut info) == 0 {
            return std::ptr::null_mut();
        }
        let library = libc::dlopen(info.dli_fname, libc::RTLD_LAZY | libc::RTLD_NOLOAD);
        if library.is_null() {
            return std::ptr::null_mut();
        }
        let found = libc::dlsym(library, name.as_ptr());
        libc::dlclose(library);
        found
    }
}
