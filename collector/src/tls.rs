//! Mutual TLS 1.3: both sides show a certificate that the configured authority signed.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use rustls::RootCertStore;
use rustls::client::verify_server_name;
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use stallscope_proto::ALPN;

/// Where the PEM files are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdentityFiles {
    /// Certificates that may sign the peer's.
    pub ca: PathBuf,
    /// Own certificate, followed by intermediate ones if there are any.
    pub cert: PathBuf,
    /// Own private key.
    pub key: PathBuf,
}

/// A certificate, its key, and whom to believe.
#[derive(Debug)]
pub struct Identity {
    authorities: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// Why an identity cannot be used. Nothing is sent or received without one.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// A file cannot be read, or is not PEM.
    #[error("{}: cannot be read as PEM: {source}", path.display())]
    Pem {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: pem::Error,
    },
    /// A file holds no certificate.
    #[error("{}: holds no certificate", path.display())]
    Empty {
        /// Which file.
        path: PathBuf,
    },
    /// A certificate of the authority is not usable.
    #[error("{}: not usable as an authority: {source}", path.display())]
    Authority {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: rustls::Error,
    },
    /// Certificate and key do not make an identity.
    #[error("certificate and key cannot be used together: {0}")]
    Refused(#[from] rustls::Error),
    /// The authorities cannot verify clients.
    #[error("authorities cannot verify clients: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
    /// The cryptography has no suite that QUIC needs.
    #[error("no cipher suite for QUIC: {0}")]
    Suite(#[from] quinn::crypto::rustls::NoInitialCipherSuite),
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let failed = |source| IdentityError::Pem {
        path: path.to_owned(),
        source,
    };
    let found: Vec<_> = CertificateDer::pem_file_iter(path)
        .map_err(failed)?
        .collect::<Result<_, _>>()
        .map_err(failed)?;
    if found.is_empty() {
        Err(IdentityError::Empty {
            path: path.to_owned(),
        })
    } else {
        Ok(found)
    }
}

/// Whether the certificate names this host: one of its subject alternative names is `name`, or a wildcard that covers it.
pub(crate) fn certifies(certificate: &CertificateDer<'_>, name: &str) -> bool {
    let (Ok(parsed), Ok(name)) = (
        ParsedCertificate::try_from(certificate),
        ServerName::try_from(name),
    ) else {
        return false;
    };
    verify_server_name(&parsed, &name).is_ok()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

impl Identity {
    /// Reads the PEM files.
    ///
    /// # Errors
    /// When one cannot be read or does not hold what it should.
    pub fn load(files: &IdentityFiles) -> Result<Self, IdentityError> {
        let mut authorities = RootCertStore::empty();
        for certificate in certificates(&files.ca)? {
            authorities
                .add(certificate)
                .map_err(|source| IdentityError::Authority {
                    path: files.ca.clone(),
                    source,
                })?;
        }
        let key = PrivateKeyDer::from_pem_file(&files.key).map_err(|source| IdentityError::Pem {
            path: files.key.clone(),
            source,
        })?;
        Ok(Self {
            authorities: Arc::new(authorities),
            chain: certificates(&files.cert)?,
            key,
        })
    }

    /// Configuration of the side that connects.
    ///
    /// # Errors
    /// When certificate and key do not fit.
    pub fn client(&self) -> Result<quinn::ClientConfig, IdentityError> {
        let mut tls = rustls::ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(self.authorities.clone())
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        // A resumed session would skip looking at certificates that may have been replaced.
        tls.resumption = rustls::client::Resumption::disabled();
        Ok(quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(
            tls,
        )?)))
    }

    /// Configuration of the side that accepts; clients must show a certificate.
    ///
    /// # Errors
    /// When certificate and key do not fit.
    pub fn server(&self) -> Result<quinn::ServerConfig, IdentityError> {
        let clients =
            WebPkiClientVerifier::builder_with_provider(self.authorities.clone(), provider()).build()?;
        let mut tls = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(clients)
            .with_single_cert(self.chain.clone(), self.key.clone_key())?;
        tls.alpn_protocols = vec![ALPN.to_vec()];
        tls.max_early_data_size = 0;
        tls.send_tls13_tickets = 0;
        Ok(quinn::ServerConfig::with_crypto(Arc::new(
            QuicServerConfig::try_from(tls)?,
        )))
    }
}
