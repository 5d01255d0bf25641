package nethsm_test

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"vault-plugin-secrets-nitrokey/hsm"
	"vault-plugin-secrets-nitrokey/nethsm"
	"vault-plugin-secrets-nitrokey/nethsm/nethsmtest"
)

// shortGrace is what tests wait for whoever made an empty carrier.
const shortGrace = 100 * time.Millisecond

const unsealCarrier = "nitroseal-object.nitroseal..material._prod._unseal.-7"

var unsealObject = hsm.ObjectRef{Application: "nitroseal", Label: "material/prod/unseal#7"}

// labelsOf lists the objects of the usual application.
func labelsOf(t *testing.T, device *nethsm.Device) []string {
	t.Helper()
	refs, err := device.Objects(shortly(t), unsealObject.Application)
	if err != nil {
		t.Fatal(err)
	}
	var labels []string
	for _, ref := range refs {
		labels = append(labels, ref.Label)
	}
	return labels
}

// The way back without this program: one request, and the line before the value says what it is.
func TestObjectReadsLikeWhatItIs(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx, admin := openDevice(t, deviceOn(h)), shortly(t), administrator(t, h)
	if err := device.WriteObject(ctx, unsealObject, []byte(`{"jwe":"…"}`)); err != nil {
		t.Fatal(err)
	}
	operator := admin.As(nethsm.Credentials{Username: nethsmtest.OperatorUser, Password: []byte(nethsmtest.OperatorPassphrase)})
	certificate, err := operator.KeyCertificate(ctx, unsealCarrier)
	if want := "nitroseal-object \"nitroseal\" \"material/prod/unseal#7\"\n{\"jwe\":\"…\"}"; err != nil || string(certificate) != want {
		t.Errorf("the certificate is %q, %v; want %q", certificate, err, want)
	}
	// The carrier itself is of no use to anybody.
	if _, _, err := operator.Encrypt(ctx, unsealCarrier, make([]byte, 16), nil); !errors.Is(err, hsm.ErrForbidden) {
		t.Errorf("encrypting with a carrier = %v, want ErrForbidden", err)
	}
	for _, query := range []hsm.KeyQuery{{}, {ID: unsealCarrier}, {Label: unsealCarrier}} {
		if keys, err := device.FindKeys(ctx, query); err != nil || len(keys) != 0 {
			t.Errorf("FindKeys(%v) = %v, %v; want no carrier", query, keys, err)
		}
	}
}

func TestInterruptedWriteLeavesNothingAndIsCompleted(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, ctx, admin := openDevice(t, deviceOn(h)), shortly(t), administrator(t, h)
	nethsm.ShortenGrace(device, shortGrace)
	// Drop: the certificate never arrives. The carrier was made.
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPut, Path: "/keys/", Drop: true, Times: 1})
	if err := device.WriteObject(ctx, unsealObject, []byte("lost")); !errors.Is(err, hsm.ErrUnavailable) {
		t.Errorf("WriteObject that is interrupted = %v, want ErrUnavailable", err)
	}
	if _, err := admin.Key(ctx, unsealCarrier); err != nil {
		t.Fatalf("the interrupted write left no carrier: %v", err)
	}
	if labels := labelsOf(t, device); len(labels) != 0 {
		t.Errorf("an interrupted write is listed: %q", labels)
	}
	if value, err := device.ReadObject(ctx, unsealObject); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("ReadObject = %q, %v; want ErrNotFound", value, err)
	}
	if err := device.DeleteObject(ctx, unsealObject); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("DeleteObject = %v, want ErrNotFound", err)
	}
	if err := device.WriteObject(ctx, unsealObject, []byte("kept")); err != nil {
		t.Fatal(err)
	}
	if value, err := device.ReadObject(ctx, unsealObject); err != nil || string(value) != "kept" {
		t.Errorf("ReadObject = %q, %v", value, err)
	}
	if err := device.DeleteObject(ctx, unsealObject); err != nil {
		t.Fatal(err)
	}
	if ids, err := admin.Keys(ctx, nethsm.KeyFilter{}); err != nil || len(ids) != 0 {
		t.Errorf("after deleting the NetHSM has the keys %q, %v", ids, err)
	}
}

func TestLostAnswersOfAWriteAreLookedFor(t *testing.T) {
	for name, fault := range map[string]nethsmtest.Fault{
		"of the carrier":     {Method: http.MethodPost, Path: "/keys/generate", Cut: true, After: -1, Times: 1},
		"of the certificate": {Method: http.MethodPut, Path: "/keys/", Cut: true, After: -1, Times: 1},
	} {
		t.Run(name, func(t *testing.T) {
			h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
			device := openDevice(t, deviceOn(h))
			nethsm.ShortenGrace(device, shortGrace)
			h.Node(0).Inject(fault)
			if err := device.WriteObject(shortly(t), unsealObject, []byte("value")); err != nil {
				t.Fatal(err)
			}
			if value, err := device.ReadObject(shortly(t), unsealObject); err != nil || string(value) != "value" {
				t.Errorf("ReadObject = %q, %v", value, err)
			}
		})
	}
}

// Of writers on several machines, who find the carrier of an interrupted write, one wins.
func TestOneWriterFillsTheCarrierThatWasLeft(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 3, Provisioned: true})
	admin := administrator(t, h)
	for round := range 10 {
		ref := hsm.ObjectRef{Application: "nitroseal", Label: fmt.Sprintf("a#%d", round)}
		_, err := admin.GenerateKey(shortly(t), nethsm.NewKey{
			ID: "nitroseal-object.nitroseal..a.-" + ref.Label[2:], Type: nethsm.TypeGeneric, Length: 128,
			Mechanisms: []nethsm.Mechanism{nethsm.AESEncryptionCBC},
		})
		if err != nil {
			t.Fatal(err)
		}
		const writers = 4
		var devices [writers]*nethsm.Device
		for i := range devices {
			devices[i] = openDevice(t, deviceOn(h))
			nethsm.ShortenGrace(devices[i], shortGrace)
		}
		var results [writers]error
		var all sync.WaitGroup
		for i := range devices {
			all.Go(func() { results[i] = devices[i].WriteObject(shortly(t), ref, fmt.Appendf(nil, "writer %d", i)) })
		}
		all.Wait()
		winner := slices.Index(results[:], nil)
		if winner < 0 {
			t.Fatalf("nobody won: %v", results)
		}
		for i, err := range results {
			if i != winner && !errors.Is(err, hsm.ErrExists) {
				t.Errorf("writer %d: %v, want ErrExists because writer %d won", i, err, winner)
			}
		}
		value, err := devices[0].ReadObject(shortly(t), ref)
		if err != nil || string(value) != fmt.Sprintf("writer %d", winner) {
			t.Errorf("ReadObject = %q, %v; writer %d won", value, err, winner)
		}
	}
}

func TestDatabaseWithoutRoomIsFull(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device := openDevice(t, deviceOn(h))
	nethsm.ShortenGrace(device, shortGrace)
	for name, fault := range map[string]nethsmtest.Fault{
		"for the carrier":     {Method: http.MethodPost, Path: "/keys/generate", Status: http.StatusInternalServerError},
		"for the certificate": {Method: http.MethodPut, Path: "/keys/", Status: http.StatusInternalServerError},
	} {
		remove := h.Node(0).Inject(fault)
		if err := device.WriteObject(shortly(t), unsealObject, []byte("value")); !errors.Is(err, hsm.ErrFull) || errors.Is(err, hsm.ErrMayHaveHappened) {
			t.Errorf("WriteObject without room %s = %v, want ErrFull", name, err)
		}
		remove()
		if labels := labelsOf(t, device); len(labels) != 0 {
			t.Errorf("without room %s there are %q", name, labels)
		}
		// Once is no proof.
		fault.Times = 1
		h.Node(0).Inject(fault)
		if err := device.WriteObject(shortly(t), unsealObject, []byte("value")); err != nil {
			t.Errorf("WriteObject after one refusal %s: %v", name, err)
		}
		if err := device.DeleteObject(shortly(t), unsealObject); err != nil {
			t.Error(err)
		}
	}
	// Where nothing can be read either, the database is away.
	h.Node(0).Fail(http.StatusInternalServerError, 0)
	defer h.Node(0).ClearFaults()
	if err := device.WriteObject(shortly(t), unsealObject, []byte("value")); !errors.Is(err, hsm.ErrUnavailable) || errors.Is(err, hsm.ErrFull) {
		t.Errorf("WriteObject without a database = %v, want ErrUnavailable", err)
	}
}

func TestValuesOfEverySizeUpToTheLimit(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
	device := openDevice(t, deviceOn(h))
	longest := 64<<10 - 1 - len("nitroseal-object \"nitroseal\" \"material/prod/unseal#7\"\n")
	for _, value := range [][]byte{{}, {'\n'}, bytes.Repeat([]byte{0}, longest), bytes.Repeat([]byte{0xff}, longest)} {
		if err := device.WriteObject(shortly(t), unsealObject, value); err != nil {
			t.Fatalf("WriteObject of %d bytes: %v", len(value), err)
		}
		if got, err := device.ReadObject(shortly(t), unsealObject); err != nil || !bytes.Equal(got, value) {
			t.Errorf("ReadObject of %d bytes gives %d, %v", len(value), len(got), err)
		}
		if err := device.DeleteObject(shortly(t), unsealObject); err != nil {
			t.Fatal(err)
		}
	}
	if err := device.WriteObject(shortly(t), unsealObject, make([]byte, longest+1)); !errors.Is(err, hsm.ErrUnsupported) {
		t.Errorf("WriteObject of %d bytes = %v, want ErrUnsupported", longest+1, err)
	}
	if labels := labelsOf(t, device); len(labels) != 0 {
		t.Errorf("there are %q", labels)
	}
}

func TestNamesTooLongForAnIDAreObjectsLikeOthers(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, admin := openDevice(t, deviceOn(h)), administrator(t, h)
	long := strings.Repeat("very/", 20) + "long#1"
	for _, ref := range []hsm.ObjectRef{
		{Application: "nitroseal", Label: long}, {Application: "nitroseal", Label: "short#1"}, {Application: "other", Label: long},
	} {
		if err := device.WriteObject(shortly(t), ref, []byte(ref.Application)); err != nil {
			t.Fatal(err)
		}
	}
	// A device that did not write them lists them as well.
	for _, reader := range []*nethsm.Device{device, openDevice(t, deviceOn(h))} {
		if got, want := labelsOf(t, reader), []string{"short#1", long}; !slices.Equal(got, want) {
			t.Errorf("Objects lists %q, want %q", got, want)
		}
		if value, err := reader.ReadObject(shortly(t), hsm.ObjectRef{Application: "nitroseal", Label: long}); err != nil || string(value) != "nitroseal" {
			t.Errorf("ReadObject = %q, %v", value, err)
		}
	}
	ids, err := admin.Keys(shortly(t), nethsm.KeyFilter{})
	if err != nil || len(ids) != 3 {
		t.Errorf("the NetHSM has the keys %q, %v", ids, err)
	}
}

func TestListLooksAtEveryObjectOnce(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	writer, device := openDevice(t, deviceOn(h)), openDevice(t, deviceOn(h))
	var want []string
	for i := range 20 {
		want = append(want, fmt.Sprintf("a#%02d", i))
		if err := writer.WriteObject(shortly(t), hsm.ObjectRef{Application: "nitroseal", Label: want[i]}, []byte("value")); err != nil {
			t.Fatal(err)
		}
	}
	for i, requests := range []int{21, 1, 1} {
		h.Node(0).ResetCounters()
		if got := labelsOf(t, device); !slices.Equal(got, want) {
			t.Errorf("Objects lists %q", got)
		}
		if n := asked(h, http.MethodGet, "/keys"); n != requests {
			t.Errorf("listing for the %d. time took %d requests, want %d", i+1, n, requests)
		}
	}
	// What somebody else deleted and began anew is looked at anew.
	ref := hsm.ObjectRef{Application: "nitroseal", Label: want[0]}
	if err := writer.DeleteObject(shortly(t), ref); err != nil {
		t.Fatal(err)
	}
	h.Node(0).Inject(nethsmtest.Fault{Method: http.MethodPut, Path: "/keys/", Drop: true, Times: 1})
	if err := writer.WriteObject(shortly(t), ref, []byte("value")); err == nil {
		t.Fatal("the write was not interrupted")
	}
	if value, err := device.ReadObject(shortly(t), ref); !errors.Is(err, hsm.ErrNotFound) {
		t.Errorf("ReadObject = %q, %v; want ErrNotFound", value, err)
	}
	if got := labelsOf(t, device); !slices.Equal(got, want[1:]) {
		t.Errorf("Objects lists %q", got)
	}
}

// Somebody puts a certificate of his own into a carrier.
func TestCertificateOfSomebodyElseIsNoObject(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	device, admin := openDevice(t, deviceOn(h)), administrator(t, h)
	_, err := admin.GenerateKey(shortly(t), nethsm.NewKey{
		ID: unsealCarrier, Type: nethsm.TypeGeneric, Length: 128, Mechanisms: []nethsm.Mechanism{nethsm.AESEncryptionCBC},
	})
	if err == nil {
		err = admin.PutKeyCertificate(shortly(t), unsealCarrier, []byte("-----BEGIN CERTIFICATE-----\n"))
	}
	if err != nil {
		t.Fatal(err)
	}
	if labels := labelsOf(t, device); len(labels) != 0 {
		t.Errorf("Objects lists %q", labels)
	}
	_, read := device.ReadObject(shortly(t), unsealObject)
	for name, err := range map[string]error{"ReadObject": read, "DeleteObject": device.DeleteObject(shortly(t), unsealObject)} {
		if err == nil || errors.Is(err, hsm.ErrNotFound) || !strings.Contains(err.Error(), unsealCarrier) {
			t.Errorf("%s = %v, want an error that names the key", name, err)
		}
	}
	if err := device.WriteObject(shortly(t), unsealObject, []byte("value")); !errors.Is(err, hsm.ErrExists) {
		t.Errorf("WriteObject = %v, want ErrExists", err)
	}
	if certificate, err := admin.KeyCertificate(shortly(t), unsealCarrier); err != nil || string(certificate) != "-----BEGIN CERTIFICATE-----\n" {
		t.Errorf("his certificate is now %q, %v", certificate, err)
	}
}

// In one namespace nobody sees the objects of another.
func TestObjectsStayInTheirNamespace(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Provisioned: true})
	root, team := openDevice(t, deviceOn(h)), openDevice(t, inNamespace(t, h))
	if err := team.WriteObject(shortly(t), unsealObject, []byte("team")); err != nil {
		t.Fatal(err)
	}
	if labels := labelsOf(t, root); len(labels) != 0 {
		t.Errorf("the root namespace lists %q", labels)
	}
	if err := root.WriteObject(shortly(t), unsealObject, []byte("root")); err != nil {
		t.Fatal(err)
	}
	if value, err := team.ReadObject(shortly(t), unsealObject); err != nil || string(value) != "team" {
		t.Errorf("the team reads %q, %v", value, err)
	}
}

// A node that answers from its cache is waited for; one that does not is not.
func TestWriteIsReadFromAnotherNode(t *testing.T) {
	h := nethsmtest.Start(t, nethsmtest.Options{Nodes: 2, Provisioned: true})
	device := openDevice(t, deviceOn(h))
	// The other node knows the carrier without its certificate for a while.
	h.Node(1).Inject(nethsmtest.Fault{Method: http.MethodGet, Path: "/keys/" + unsealCarrier + "/cert", Status: http.StatusNotFound, Times: 3})
	if err := device.WriteObject(shortly(t), unsealObject, []byte("value")); err != nil {
		t.Fatal(err)
	}
	if n := asked(h, http.MethodGet, "/keys/"+unsealCarrier+"/cert"); n != 5 {
		t.Errorf("the value was read %d times, want once where it was written and four times elsewhere", n)
	}
	h.Node(1).Stop()
	if err := device.WriteObject(shortly(t), hsm.ObjectRef{Application: "nitroseal", Label: "b#1"}, []byte("value")); err != nil {
		t.Errorf("WriteObject while the other node is away: %v", err)
	}
}
