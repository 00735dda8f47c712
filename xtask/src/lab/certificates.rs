//! Certificates for one run: an authority, and a key pair per node and collector that both sides check.

use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};

/// An authority that lives as long as a run.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    dir: PathBuf,
}

/// PEM files of one member.
#[derive(Debug, Clone)]
pub struct Identity {
    /// The authority's certificate.
    pub ca: PathBuf,
    /// The member's certificate.
    pub cert: PathBuf,
    /// The member's key.
    pub key: PathBuf,
}

impl Authority {
    /// Makes an authority whose files lie in `dir`.
    ///
    /// # Errors
    /// The files cannot be written.
    pub fn create(dir: &Path) -> Result<Self> {
        fs::create_dir_all(dir).with_context(|| format!("failed to create {}", dir.display()))?;
        let mut params = CertificateParams::default();
        params
            .distinguished_name
            .push(DnType::CommonName, "stallscope lab authority");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
        fs::write(dir.join("ca.pem"), issuer.pem())?;
        Ok(Self {
            issuer,
            dir: dir.to_owned(),
        })
    }

    /// Issues a certificate for `name`, reachable under `addresses`, good for both ends of a connection.
    ///
    /// # Errors
    /// The name is not a host name, or the files cannot be written.
    pub fn issue(&self, name: &str, addresses: &[IpAddr]) -> Result<Identity> {
        let mut names = vec![name.to_owned()];
        names.extend(addresses.iter().map(ToString::to_string));
        let mut params = CertificateParams::new(names)?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let key = KeyPair::generate()?;
        let cert = params.signed_by(&key, &self.issuer)?;
        let identity = Identity {
            ca: self.dir.join("ca.pem"),
            cert: self.dir.join(format!("{name}.pem")),
            key: self.dir.join(format!("{name}.key")),
        };
        fs::write(&identity.cert, cert.pem())?;
        write_secret(&identity.key, &key.serialize_pem())?;
        Ok(identity)
    }
}

fn write_secret(path: &Path, text: &str) -> Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)?;
    Ok(file.write_all(text.as_bytes())?)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn keys_are_private_and_certificates_differ() {
        let dir = tempfile::tempdir().unwrap();
        let authority = Authority::create(dir.path()).unwrap();
        let node = authority.issue("node0", &["10.0.0.2".parse().unwrap()]).unwrap();
        let other = authority.issue("node1", &[]).unwrap();
        assert_eq!(
            fs::metadata(&node.key).unwrap().permissions().mode() & 0o777,
            0o600
        );
        assert_ne!(fs::read(&node.cert).unwrap(), fs::read(&other.cert).unwrap());
        assert_eq!(node.ca, other.ca);
        assert!(
            fs::read_to_string(&node.ca)
                .unwrap()
                .contains("BEGIN CERTIFICATE")
        );
    }
}
