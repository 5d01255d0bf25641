// Command rawdecrypt measures what an HSM's module does by itself: C_DecryptInit and one C_Decrypt with a buffer, in a
// loop, in one session, with nothing of this project in between. The benchmarks compare everything else with it.
//
// It is told what to use by one line of JSON on stdin, [Setup]. Then each line is "N CLIENTS": so many goroutines, each
// with a session of its own, decrypt N times each. The answer is one line of durations in nanoseconds, separated by
// blanks: first that of the whole, then that of each operation.
package main

/*
#cgo LDFLAGS: -ldl
#include <dlfcn.h>
#include <stdlib.h>

typedef unsigned long ulong_t;
typedef struct { ulong_t type; void *value; ulong_t len; } attribute;
typedef struct { ulong_t mechanism; void *parameter; ulong_t len; } mechanism;
struct list { unsigned char version[2]; void *function[68]; }; // CK_FUNCTION_LIST, in the order of the standard
typedef struct { ulong_t hash, mgf, source; void *data; ulong_t len; } oaep;

static ulong_t key;
static ulong_t (*open_session)(ulong_t, ulong_t, void *, void *, ulong_t *);
static ulong_t (*decrypt_init)(ulong_t, mechanism *, ulong_t);
static ulong_t (*decrypt)(ulong_t, unsigned char *, ulong_t, unsigned char *, ulong_t *);

// open_key logs in to the slot and finds the private key with the id. 0 is success, else the CKR_ code.
static ulong_t open_key(const char *path, ulong_t slot, char *pin, ulong_t pin_len, void *id, ulong_t id_len) {
	ulong_t session;
	void *module = dlopen(path, RTLD_NOW);
	if (module == NULL)
		return ~0UL;
	ulong_t (*get_list)(struct list **) = dlsym(module, "C_GetFunctionList");
	struct list *list;
	if (get_list == NULL || get_list(&list) != 0)
		return ~0UL;
	ulong_t (*initialize)(void *) = list->function[0];
	open_session = list->function[12];
	ulong_t (*login)(ulong_t, ulong_t, char *, ulong_t) = list->function[18];
	ulong_t (*find_init)(ulong_t, attribute *, ulong_t) = list->function[26];
	ulong_t (*find)(ulong_t, ulong_t *, ulong_t, ulong_t *) = list->function[27];
	ulong_t (*find_final)(ulong_t) = list->function[28];
	decrypt_init = list->function[33];
	decrypt = list->function[34];

	ulong_t rv, found = 0, private_key = 3; // CKO_PRIVATE_KEY
	attribute query[] = {{0x000, &private_key, sizeof private_key}, {0x102, id, id_len}}; // CKA_CLASS, CKA_ID
	ulong_t flags = 2; // CKF_OS_LOCKING_OK: several threads will call
	void *arguments[6] = {NULL, NULL, NULL, NULL, (void *)flags, NULL};
	if ((rv = initialize(arguments)) || (rv = open_session(slot, 4, NULL, NULL, &session)) || // CKF_SERIAL_SESSION
	    (rv = login(session, 1, pin, pin_len)) || (rv = find_init(session, query, 2)) ||
	    (rv = find(session, &key, 1, &found)) || (rv = find_final(session)))
		return rv;
	return found == 1 ? 0 : 0x82; // CKR_OBJECT_HANDLE_INVALID
}

static ulong_t new_session(ulong_t slot, ulong_t *session) { return open_session(slot, 4, NULL, NULL, session); }

// once decrypts one RSA-OAEP block with SHA-1, which is what SoftHSM has.
static ulong_t once(ulong_t session, unsigned char *in, ulong_t in_len, unsigned char *out, ulong_t out_len) {
	oaep parameter = {0x220, 1, 1, NULL, 0}; // CKM_SHA_1, CKG_MGF1_SHA1, CKZ_DATA_SPECIFIED
	mechanism m = {9, &parameter, sizeof parameter}; // CKM_RSA_PKCS_OAEP
	ulong_t rv = decrypt_init(session, &m, key);
	return rv ? rv : decrypt(session, in, in_len, out, &out_len);
}
*/
import "C"

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"sync"
	"time"
	"unsafe"
)

// Setup says what to measure.
type Setup struct {
	Module     string `json:"module"`
	Slot       uint   `json:"slot"`
	PIN        string `json:"pin"`
	KeyID      []byte `json:"key_id"`
	Ciphertext []byte `json:"ciphertext"`
}

func main() {
	if err := serve(); err != nil {
		fmt.Fprintln(os.Stderr, "rawdecrypt:", err)
		os.Exit(1)
	}
}

func serve() error {
	lines := bufio.NewScanner(os.Stdin)
	if !lines.Scan() {
		return fmt.Errorf("reading the set-up: %w", lines.Err())
	}
	var setup Setup
	if err := json.Unmarshal(lines.Bytes(), &setup); err != nil {
		return fmt.Errorf("reading the set-up: %w", err)
	}
	path, pin := C.CString(setup.Module), C.CString(setup.PIN)
	defer C.free(unsafe.Pointer(path))
	defer C.free(unsafe.Pointer(pin))
	if rv := C.open_key(path, C.ulong_t(setup.Slot), pin, C.ulong_t(len(setup.PIN)),
		unsafe.Pointer(&setup.KeyID[0]), C.ulong_t(len(setup.KeyID))); rv != 0 {
		return fmt.Errorf("opening the key: 0x%x", uint64(rv))
	}

	for lines.Scan() {
		var n, clients int
		if _, err := fmt.Sscan(lines.Text(), &n, &clients); err != nil {
			return fmt.Errorf("reading %q: %w", lines.Text(), err)
		}
		durations, err := measure(setup, n, clients)
		if err != nil {
			return err
		}
		fmt.Println(strings.Trim(fmt.Sprint(durations), "[]"))
	}
	return lines.Err()
}

// measure returns nanoseconds: of the whole, then of each operation.
func measure(setup Setup, n, clients int) ([]int64, error) {
	durations := make([]int64, 1+n*clients)
	failures := make(chan error, clients)
	var group sync.WaitGroup
	began := time.Now()
	for client := range clients {
		group.Go(func() {
			mine := durations[1+client*n:][:n]
			if err := loop(setup, mine); err != nil {
				failures <- err
			}
		})
	}
	group.Wait()
	durations[0] = time.Since(began).Nanoseconds()
	select {
	case err := <-failures:
		return nil, err
	default:
		return durations, nil
	}
}

// loop decrypts as often as there are durations to fill in.
func loop(setup Setup, durations []int64) error {
	var session C.ulong_t
	if rv := C.new_session(C.ulong_t(setup.Slot), &session); rv != 0 {
		return fmt.Errorf("C_OpenSession: 0x%x", uint64(rv))
	}
	out := make([]byte, len(setup.Ciphertext))
	in, to := (*C.uchar)(&setup.Ciphertext[0]), (*C.uchar)(&out[0])
	for i := range durations {
		began := time.Now()
		rv := C.once(session, in, C.ulong_t(len(setup.Ciphertext)), to, C.ulong_t(len(out)))
		durations[i] = time.Since(began).Nanoseconds()
		if rv != 0 {
			return fmt.Errorf("C_Decrypt: 0x%x", uint64(rv))
		}
	}
	return nil
}
