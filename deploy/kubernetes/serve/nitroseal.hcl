state_dir   = "/var/lib/nitroseal/state"
secrets_dir = "/run/secrets"

device "rack" {
  type          = "nethsm"
  urls          = ["https://nethsm-0.example:443", "https://nethsm-1.example:443"]
  username      = "nitroseal"
  password_file = "/run/secrets/nitroseal/operator-password"
  ca_cert_file  = "/run/nitroseal/trust/nethsm-ca.pem"
}

# Both servers know the same tokens.
store "etcd" {
  type             = "etcd"
  endpoints        = ["https://etcd-0.etcd.svc:2379", "https://etcd-1.etcd.svc:2379", "https://etcd-2.etcd.svc:2379"]
  prefix           = "nitroseal-serve"
  ca_cert_file     = "/run/nitroseal/trust/etcd-ca.pem"
  client_cert_file = "/run/nitroseal/trust/etcd-client.pem"
  client_key_file  = "/run/secrets/nitroseal/etcd-client-key.pem"
}

serve {
  listen        = "0.0.0.0:8210"
  tls_cert_file = "/run/secrets/nitroseal-listener/tls.crt"
  tls_key_file  = "/run/secrets/nitroseal-listener/tls.key"
  tokens        = "etcd"
}
