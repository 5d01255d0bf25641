package nethsm

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"testing/synctest"
	"time"
	"unsafe"
)

func TestEncodeJSON(t *testing.T) {
	type restrictions struct {
		Tags []string `json:"tags"`
	}
	tests := []struct {
		name  string
		value any
		want  string
	}{
		{"a secret alone", struct {
			A secret `json:"a"`
		}{secret("x")}, `{"a":"x"}`},
		{"a secret among others, behind a pointer", &struct {
			A string       `json:"a"`
			B secret       `json:"b"`
			C int          `json:"c,omitempty"`
			D restrictions `json:"d"`
		}{"1", secret("2"), 0, restrictions{[]string{"t"}}}, `{"a":"1","b":"2","d":{"tags":["t"]}}`},
		{"what JSON escapes", struct {
			A secret `json:"a"`
		}{secret("\"\\\x00\x1f/\té€\U0001F511")}, "{\"a\":\"\\\"\\\\\\u0000\\u001f/\\u0009é€\U0001F511\"}"},
		{"an empty secret", struct {
			A secret `json:"a"`
			B secret `json:"b,omitempty"`
		}{}, `{"a":""}`},
		{"no secret", map[string]int{"a": 1}, `{"a":1}`},
		{"nothing at all", struct{}{}, `{}`},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			body, err := encodeJSON(test.value)
			if err != nil || string(body) != test.want {
				t.Errorf("encodeJSON = %s, %v; want %s", body, err, test.want)
			}
			if !json.Valid(body) {
				t.Error("it is not JSON")
			}
		})
	}
	nested := struct {
		A struct {
			B secret `json:"b"`
		} `json:"a"`
	}{}
	nested.A.B = secret("sesame")
	if body, err := encodeJSON(nested); err == nil || strings.Contains(err.Error(), "sesame") {
		t.Errorf("a secret where it could not be wiped: %s, %v; want an error that does not tell it", body, err)
	}
}

// The buffer never moves, so that wiping it wipes the secret.
func TestEncodedSecretsDoNotMove(t *testing.T) {
	for _, filler := range []string{"x", "\x00", "\"", "\xff", "é"} {
		body, err := encodeJSON(struct {
			LongNameOfAMember secret `json:"longNameOfAMember,omitempty"`
			B                 secret `json:"b"`
		}{secret(strings.Repeat(filler, 1000)), secret(strings.Repeat(filler, 200))})
		if err != nil {
			t.Fatal(err)
		}
		whole := body[:cap(body)]
		clear(body)
		if len(body) > cap(body) || !bytes.Equal(whole[:len(body)], make([]byte, len(body))) {
			t.Error("it moved")
		}
		size := 2 + 2*6*1000
		if cap(body) > 2*size {
			t.Errorf("%d bytes for a body of %d", cap(body), len(body))
		}
	}
}

func FuzzEncodeSecret(f *testing.F) {
	f.Add([]byte("UnlockPassphrase"))
	f.Add([]byte("\"\\\x00\x7f\xc3\x28"))
	f.Fuzz(func(t *testing.T, text []byte) {
		body, err := encodeJSON(struct {
			A secret `json:"a"`
		}{text})
		if err != nil {
			t.Fatal(err)
		}
		var got struct {
			A string `json:"a"`
		}
		if err := json.Unmarshal(body, &got); err != nil || got.A != strings.ToValidUTF8(string(text), "�") && string([]rune(string(text))) != got.A {
			t.Errorf("%q became %q, %v", text, got.A, err)
		}
	})
}

func TestReadBody(t *testing.T) {
	text := strings.Repeat("0123456789", 2000)
	tests := []struct {
		name          string
		reader        io.Reader
		length, limit int64
		want          string
		err           error
	}{
		{"announced", strings.NewReader(text), 20000, 20000, text, nil},
		{"not announced", strings.NewReader(text), -1, 20000, text, nil},
		{"a byte at a time", iotest.OneByteReader(strings.NewReader(text)), -1, 20000, text, nil},
		{"the end comes with the data", iotest.DataErrReader(strings.NewReader(text)), 20000, 20000, text, nil},
		{"empty", strings.NewReader(""), 0, 10, "", nil},
		{"empty, not announced", strings.NewReader(""), -1, 10, "", nil},
		{"announced and too large", strings.NewReader(text), 20000, 19999, "", errTooLarge},
		{"not announced and too large", strings.NewReader(text), -1, 19999, "", errTooLarge},
		{"nothing is allowed", strings.NewReader("x"), -1, 0, "", errTooLarge},
		{"it breaks off", io.MultiReader(strings.NewReader(text), iotest.ErrReader(io.ErrUnexpectedEOF)), -1, 30000, "", io.ErrUnexpectedEOF},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			body, err := readBody(test.reader, test.length, test.limit)
			if string(body) != test.want || !errors.Is(err, test.err) {
				t.Errorf("readBody = %d bytes, %v; want %d, %v", len(body), err, len(test.want), test.err)
			}
		})
	}
}

// spy gives out a secret and keeps where it was put.
type spy struct {
	left    int
	buffers map[*byte]int
}

func (s *spy) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, io.EOF
	}
	n := min(len(p), s.left)
	for i := range n {
		p[i] = 's'
	}
	s.left -= n
	s.buffers[unsafe.SliceData(p)] = n
	return n, nil
}

// Buffers that were outgrown hold nothing any more.
func TestOutgrownBuffersAreWiped(t *testing.T) {
	from := &spy{left: 100_000, buffers: make(map[*byte]int)}
	body, err := readBody(from, -1, 1<<20)
	if err != nil || len(body) != 100_000 {
		t.Fatal(len(body), err)
	}
	begin := uintptr(unsafe.Pointer(unsafe.SliceData(body)))
	for start, n := range from.buffers {
		at := uintptr(unsafe.Pointer(start))
		if at >= begin && at < begin+uintptr(cap(body)) {
			continue
		}
		if old := unsafe.Slice(start, n); !bytes.Equal(old, make([]byte, n)) {
			t.Errorf("a buffer of %d bytes still holds the answer", n)
		}
	}
}

// A body that a transport may still read is cleared when it has done, and not before.
func TestBodyIsClearedWhenItIsReadNoMore(t *testing.T) {
	within(t, Options{}, handlers(healthy), func(s *scene) {
		t, p := s.T, s.client.pool
		unread := &payload{bytes: []byte("secret")}
		p.wipe(unread)
		if string(unread.bytes) == "secret" {
			t.Error("a body that nobody reads was left")
		}

		body := &payload{bytes: []byte("secret")}
		body.begin()
		body.begin()
		body.end()
		p.wipe(body)
		synctest.Wait()
		if string(body.bytes) != "secret" {
			t.Error("it was cleared while it was read")
		}
		body.end()
		synctest.Wait()
		if string(body.bytes) == "secret" {
			t.Error("it was left")
		}

		never := &payload{bytes: []byte("secret")} // a connection that ended before it looked at the request
		never.begin()
		p.wipe(never)
		later(wipeTime)
		synctest.Wait()
		if string(never.bytes) == "secret" {
			t.Error("a body that was never written was left")
		}

		theirs := &payload{bytes: []byte("theirs")}
		theirs.begin()
		time.AfterFunc(writeTime/2, theirs.end)
		began := time.Now()
		theirs.settle()
		if took := time.Since(began); took != writeTime/2 {
			t.Errorf("the caller's body was waited for %v, want until it was written", took)
		}
	})
}

func TestMessage(t *testing.T) {
	for body, want := range map[string]string{
		`{"message":"Decryption failure"}`: "Decryption failure",
		``:                                 "",
		`Not found`:                        "",
		`{"message":5}`:                    "",
		`[]`:                               "",
		`null`:                             "",
	} {
		if got := message([]byte(body)); got != want {
			t.Errorf("message(%s) = %q, want %q", body, got, want)
		}
	}
}

// Close does not keep a body from being wiped: not one that waits to be, and not one that comes later.
func TestBodyIsWipedInSpiteOfClose(t *testing.T) {
	within(t, Options{}, handlers(healthy), func(s *scene) {
		t := s.T
		p := s.client.pool
		waiting, late, never := &payload{bytes: []byte("sesame")}, &payload{bytes: []byte("sesame")}, &payload{bytes: []byte("sesame")}
		wiped := func(body *payload) bool { return string(body.bytes) == "\x00\x00\x00\x00\x00\x00" }
		waiting.begin()
		never.begin()
		p.wipe(waiting)
		p.wipe(never)
		var read string
		time.AfterFunc(20*time.Millisecond, func() { // the connection's end is noticed
			read = string(waiting.bytes)
			waiting.end()
		})
		began := time.Now()
		if err := s.client.Close(); err != nil {
			t.Error(err)
		}
		if took := time.Since(began); took > time.Second {
			t.Errorf("Close took %v", took)
		}
		if read != "sesame" {
			t.Error("it was wiped while it was read")
		}
		late.begin()
		p.wipe(late)
		raw := &payload{bytes: []byte("sesame")}
		raw.begin()
		time.AfterFunc(20*time.Millisecond, raw.end)
		settling := time.Now()
		raw.settle()
		if took := time.Since(settling); took != 20*time.Millisecond {
			t.Errorf("a caller's body was given back after %v, while it was read", took)
		}
		for i, body := range []*payload{waiting, late, never} {
			if !wiped(body) {
				t.Errorf("body %d is still there", i)
			}
		}
	})
}
