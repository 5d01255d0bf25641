# nitroseal.hcl: the configuration of the command nitroseal, with everything that can be set.
#
# Paths are relative to the folder of this file. The file holds no secret: each comes from a file (…_file) or from an
# environment variable (…_env). Secret files, like this one, must not be writable by others than their owner. A secret file
# may be "credential:NAME" as well: what systemd hands over by LoadCredential=NAME:FILE in the unit. What is not known is
# refused: "nitroseal config check" says where.

# Where the command keeps wrapping keys, and the PIN ledger that makes sure that a wrong PIN is sent once only. All programs
# of ours on this machine share it. It must exist, belong to the user who runs the command and be writable by nobody else:
# install -d -m 700 /var/lib/nitroseal
state_dir = "/var/lib/nitroseal"

# The folder under which all secret files must lie, with what their links point to. Optional; they may lie anywhere
# without it.
secrets_dir = "secrets"

# What may be loaded to talk to PKCS#11 tokens. Not needed for a NetHSM.
pkcs11 {
  # The vendors' modules that devices may use: absolute paths, writable by nobody but root or this user.
  modules = ["/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so", "/usr/lib/softhsm/libsofthsm2.so"]
  # Environment variables that the modules get; they get no others. Optional.
  env = ["OPENSC_CONF", "SOFTHSM2_CONF"]
  # The program that loads the modules where this one was built without cgo, and its SHA-256. Optional.
  module_host        = "/usr/libexec/nitroseal-glibc"
  module_host_sha256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
}

# A Nitrokey HSM 2, or any other PKCS#11 token.
device "stick" {
  type = "pkcs11"
  # One of pkcs11.modules; may be left out where there is only one.
  module = "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so"
  # Exactly one of serial, token_label and slot chooses the token. A serial number is found in whatever slot it is.
  serial = "DENK0100001"
  # The user PIN: pin_file or pin_env.
  pin_file = "secrets/stick.pin"
  # How many operations the token takes at a time: 1 for a card, 8 for SoftHSM. Default 1.
  parallel = 1
  # How long one operation may stay inside the module before that is given up. Defaults 20s and 5m.
  decrypt_timeout  = "20s"
  generate_timeout = "5m"
}

device "laptop" {
  type        = "pkcs11"
  module      = "/usr/lib/softhsm/libsofthsm2.so"
  token_label = "throw-away"
  pin_env     = "NITROSEAL_LAPTOP_PIN"
}

device "reader" {
  type    = "pkcs11"
  module  = "/usr/lib/x86_64-linux-gnu/opensc-pkcs11.so"
  slot    = 0
  pin_env = "NITROSEAL_READER_PIN"
}

# A NetHSM: an appliance or a container, one node or a cluster.
device "rack" {
  type = "nethsm"
  # All nodes of one cluster; any of them may serve.
  urls = ["https://nethsm-1.example.org", "https://nethsm-2.example.org:8443"]
  # A user of role Operator, "namespace~user" for one in a namespace, and password_file or password_env.
  username      = "operator"
  password_file = "secrets/operator.password"
  # A user of role Administrator, and admin_password_file or admin_password_env. Only what makes, deletes or locks
  # something needs one. Optional.
  admin_username      = "admin"
  admin_password_file = "secrets/admin.password"
  # Unlocks a node that is found locked: unlock_passphrase_file or unlock_passphrase_env. Without it a person does, by
  # "nitroseal device unlock". Optional.
  unlock_passphrase_file = "secrets/unlock.passphrase"
  # Whom to trust: the authority of the nodes' certificates (default: the system's), and the SHA-256 of certificates, of
  # which a node must show one. tls_server_name is the name in the certificates where it is not the host of the URL.
  ca_cert_file    = "ca.pem"
  tls_pins        = ["a1:b2:c3:d4:e5:f6:07:18:29:3a:4b:5c:6d:7e:8f:90:a1:b2:c3:d4:e5:f6:07:18:29:3a:4b:5c:6d:7e:8f:90"]
  tls_server_name = "nethsm.example.org"
  # true accepts any certificate, and so anybody on the way. For a first look in a laboratory only. Default false.
  tls_insecure = false
  # How long one call may take. Default 10s.
  request_timeout = "10s"
  # true lets a store of type "object" lie in the certificate slots of keys; it needs the Administrator. Default false.
  object_store = true
  # Tags that restrict keys which are made here: only users with one of them may use the keys. Optional.
  key_tags = ["nitroseal"]
}

device "lab" {
  type                  = "nethsm"
  urls                  = ["https://127.0.0.1:8443"]
  username              = "operator"
  password_env          = "NITROSEAL_LAB_PASSWORD"
  admin_username        = "admin"
  admin_password_env    = "NITROSEAL_LAB_ADMIN_PASSWORD"
  unlock_passphrase_env = "NITROSEAL_LAB_UNLOCK"
}

# Where sealed material lies: etcd is the one for more than one machine.
store "cluster" {
  type      = "etcd"
  endpoints = ["https://etcd-1.example.org:2379", "https://etcd-2.example.org:2379"]
  # The folder of all our keys; without a leading "/".
  prefix = "nitroseal/prod"
  # Where etcd asks for a user: password_file or password_env. Optional.
  username      = "nitroseal"
  password_file = "secrets/etcd.password"
  # The authority of the members' certificates (default: the system's), and our own certificate with its key.
  ca_cert_file     = "ca.pem"
  client_cert_file = "client.pem"
  client_key_file  = "secrets/client.key"
  # The name in the members' certificates where it is not the host of the endpoint. Optional.
  server_name = "etcd.example.org"
  # How long one operation may take, at most 1m. Default 10s.
  request_timeout = "10s"
  # true accepts http:// beyond this machine: others on the way can then read names and envelopes. Default false.
  insecure = false
}

store "etcd-by-password" {
  type         = "etcd"
  endpoints    = ["https://etcd-1.example.org:2379"]
  prefix       = "nitroseal/test"
  username     = "nitroseal"
  password_env = "NITROSEAL_ETCD_PASSWORD"
}

# Data objects on an HSM: the stick carries its own envelopes.
store "on-the-stick" {
  type   = "object"
  device = "stick"
  # CKA_APPLICATION of the objects. Default "nitroseal".
  application = "nitroseal"
}

# A folder of this machine.
store "here" {
  type = "file"
  dir  = "/var/lib/nitroseal/material"
}

# The Vault or OpenBao that runs the plugin; "nitroseal doctor" asks it. Optional.
vault {
  address = "https://vault.example.org:8200"
  # The authority of its certificate (default: the system's), and its name where that is not the host of the address.
  ca_cert_file    = "ca.pem"
  tls_server_name = "vault.example.org"
  # A token that may read sys/plugins and the mount: token_file or token_env. Optional.
  token_file = "secrets/vault.token"
  # Where the plugin is mounted, its name in the catalog (these are the defaults), and its file on this machine.
  mount       = "nitrokey"
  plugin_name = "vault-plugin-secrets-nitrokey"
  plugin_file = "/etc/vault/plugins/vault-plugin-secrets-nitrokey"
}

# A Vault or OpenBao cluster whose unseal material is kept here: "nitroseal init" initialises it, "nitroseal run" unseals its
# nodes. The name is part of what the envelopes are sealed for: it cannot be changed afterwards.
cluster "prod" {
  # The nodes themselves, not a balancer, which would see the shares. The first one is initialised; on raft the others join it.
  nodes = ["https://vault-1.example.org:8200", "https://vault-2.example.org:8200", "https://vault-3.example.org:8200"]
  # How a node is known before a share is sent to it: the authority of this cluster's certificates, or the SHA-256 of its
  # nodes' public keys, or both. The system's authorities are never asked. tls_server_name is the name in the certificates
  # where it is not the host of the address.
  ca_cert_file    = "ca.pem"
  tls_pins        = ["a1:b2:c3:d4:e5:f6:07:18:29:3a:4b:5c:6d:7e:8f:90:a1:b2:c3:d4:e5:f6:07:18:29:3a:4b:5c:6d:7e:8f:90"]
  tls_server_name = "vault.example.org"
  # The wrapping key that seals the material: any of its HSMs opens it. Or spread, below.
  key = "prod"
  # Where the envelopes lie.
  store = "cluster"
  # How many unseal keys there are and how many of them unseal. Defaults 5 and 3.
  shares    = 5
  threshold = 3
  # The same for the recovery keys of a cluster that unseals itself (seal "transit" and the like). Defaults 5 and 3.
  recovery_shares    = 5
  recovery_threshold = 3
  # Each person takes one of the shares, encrypted to the OpenPGP key; nobody else ever sees it. Optional.
  person "alice" {
    pgp_key_file = "alice.asc"
  }
  person "bob" {
    pgp_key_file = "bob.asc"
  }
  # What becomes of the root token: "discard" (default) revokes it, "keep" seals it like the unseal keys, "pgp" gives it
  # out, encrypted to root_pgp_key_file.
  root_token        = "pgp"
  root_pgp_key_file = "alice.asc"
  # The authority by which the other nodes know the first one when they join it. Default: ca_cert_file.
  raft_leader_ca_file = "ca.pem"
  # How long an ordinary call of a node may take. Default 10s.
  timeout = "10s"
}

cluster "bunkered" {
  nodes = ["http://127.0.0.1:8200"]
  # true allows http:// to this machine: every program that takes the port gets the shares. Default false.
  plain_http = true
  # The shares are dealt to the HSMs of these wrapping keys, so that this many of them must take part.
  spread = "2 of office, bunker, bank"
  store  = "here"
}

# How "nitroseal run" behaves. Optional.
run {
  # Where it answers /healthz, /readyz and /metrics; "" for nowhere. Default "127.0.0.1:9108".
  listen        = "0.0.0.0:9108"
  tls_cert_file = "run.pem"
  tls_key_file  = "credential:run.key"
  # true lets it answer others than this machine without TLS: they can read it, and those on the way can change it. Default
  # false.
  plain_http = false
  # How often a node that is well is looked at. Default 5s.
  interval = "5s"
}

# How "nitroseal serve" behaves: the server that a Vault's or OpenBao's seal "transit" asks. Optional; without it there is no server.
serve {
  # Host and port. Default "0.0.0.0:8210".
  listen = "0.0.0.0:8210"
  # Its certificate and key, taken anew when they change; a credential does so with a restart of the service only.
  tls_cert_file = "serve.pem"
  tls_key_file  = "credential:serve.key"
  # true does without TLS, for a loopback address alone: tokens and the keys of Vaults pass in the clear. Default false.
  plain_http = false
  # Who signs client certificates. "required" (default with client_ca_file): every client shows one; "optional": those whose token
  # is bound to a name in it.
  client_ca_file      = "ca.pem"
  client_certificates = "optional"
  # The path of the keys, as mount_path of the seal has it. Default "transit".
  mount = "transit"
  # The wrapping keys that are served. Default: all that tokens name.
  keys = ["prod", "stage"]
  # The store of the tokens, of type "etcd" where several servers share them. Default: a folder of state_dir.
  tokens = "cluster"
  # How many requests a token has in a second, and at once after a pause, unless it was made with a limit of its own; rate = 0 is no
  # limit. Defaults 100, and ten times the rate.
  rate  = 100
  burst = 1000
  # The size of the largest request in bytes, and how many connections are served at one time. Defaults 262144 and 4096.
  max_body        = 262144
  max_connections = 4096
  # Where it answers /healthz, /readyz and /metrics, without TLS and to this machine alone; "" for nowhere. Default "127.0.0.1:9109".
  metrics_listen = "127.0.0.1:9109"
  # true keeps all of its memory from being swapped, not only keys: up to 140 MB. Default false.
  mlock = true
}

# Where acts of custody, and what is opened for seals, are written down before they are done. Each needs one of these to take it.
# Default: audit.log in state_dir; of "nitroseal serve" systemd's journal, where there is one.
audit "file" {
  path = "/var/log/nitroseal/audit.log"
}

audit "journal" {
}

audit "syslog" {
  # The socket of this machine's syslog server (default "/dev/log"), or a server elsewhere, "tcp://host:601" or
  # "udp://host:514": that one gets copies, and an act needs another sink besides, since nobody could say that it has them.
  address = "/run/systemd/journal/syslog"
}
