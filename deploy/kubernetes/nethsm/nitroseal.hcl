state_dir   = "/var/lib/nitroseal/state"
secrets_dir = "/run/secrets"

device "rack" {
  type          = "nethsm"
  urls          = ["https://nethsm-0.example:443", "https://nethsm-1.example:443"]
  username      = "nitroseal"
  password_file = "/run/secrets/nitroseal/operator-password"
  ca_cert_file  = "/run/nitroseal/trust/nethsm-ca.pem"
}

store "etcd" {
  type             = "etcd"
  endpoints        = ["https://etcd-0.etcd.svc:2379", "https://etcd-1.etcd.svc:2379", "https://etcd-2.etcd.svc:2379"]
  prefix           = "nitroseal"
  ca_cert_file     = "/run/nitroseal/trust/etcd-ca.pem"
  client_cert_file = "/run/nitroseal/trust/etcd-client.pem"
  client_key_file  = "/run/secrets/nitroseal/etcd-client-key.pem"
}

cluster "vault" {
  nodes = [
    "https://vault-0.vault-internal.vault.svc:8200",
    "https://vault-1.vault-internal.vault.svc:8200",
    "https://vault-2.vault-internal.vault.svc:8200",
  ]
  ca_cert_file = "/run/nitroseal/trust/vault-ca.pem"
  key          = "vault"
  store        = "etcd"
}

run {
  listen        = "0.0.0.0:9108"
  tls_cert_file = "/run/secrets/nitroseal-listener/tls.crt"
  tls_key_file  = "/run/secrets/nitroseal-listener/tls.key"
}
